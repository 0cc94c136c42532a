"""What a transport is: performs the operations of one group.

Implementations: `collectives.TorchTransport` (torch.distributed: Gloo, NCCL), `shared_memory.SharedMemoryTransport`
(ranks of one node), and the fake for tests, `inprocess.run_in_process`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from shoal.ops import Op
from shoal.wire.traffic import Traffic


@dataclass(frozen=True)
class Memory:
    """A pair of flat tensors to exchange; see `strategy.bucket.Bucket` for what each means."""

    source: Tensor
    target: Tensor
    portion: slice


class Transport(Protocol):
    """Performs operations for one group; used by one thread at a time."""

    traffic: Traffic
    """What this rank has put on the network so far."""

    @property
    def is_stuck(self) -> bool:
        """Whether a thread waits in vain for a message of this transport, although its view was cut."""

    def allocate(self, num_values: int, dtype: torch.dtype) -> Memory:
        """Make zeroed memory that `AllReduce` works on fastest. Collective: every member, in the same order."""

    def perform(self, op: Op) -> Any:
        """Carry out one operation and return its result.

        Raises:
            PeerLostError: a member vanished or stayed silent for too long.
        """

    def close(self) -> None:
        """Give back sockets and memory."""


class MemoryPool:
    """Memory that outlives a view: the next one's buckets are as large as this one's, and fresh pages take time.

    What is taken again holds what it last held; it goes to whoever asks for the same size in the same order, so gaps
    between parameters, which are zero, stay where they are.
    """

    def __init__(self) -> None:
        self._taken: list[Tensor] = []
        self._free: list[Tensor] = []

    def take(self, num_values: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory of shape (num_values,): the first free one of that size, or a new one, zeroed."""
        for place, memory in enumerate(self._free):
            if (memory.numel(), memory.dtype, memory.device.type) == (num_values, dtype, device.type):
                self._taken.append(self._free.pop(place))
                return self._taken[-1]
        self._taken.append(torch.zeros(num_values, dtype=dtype, device=device))
        return self._taken[-1]

    def release(self) -> None:
        """All that was taken may be taken again: nobody uses it any more. What nobody took again is let go."""
        if self._taken:
            self._free, self._taken = self._taken, []


def private_memory(num_values: int, dtype: torch.dtype, device: torch.device, pool: MemoryPool | None = None) -> Memory:
    """Memory of this rank alone, where the sum replaces the contribution."""
    flat = (pool or MemoryPool()).take(num_values, dtype, device)
    return Memory(flat, flat, slice(0, num_values))
