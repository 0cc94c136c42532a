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

    def allocate(self, num_values: int, dtype: torch.dtype) -> Memory:
        """Make zeroed memory that `AllReduce` works on fastest. Collective: every member, in the same order."""

    def perform(self, op: Op) -> Any:
        """Carry out one operation and return its result.

        Raises:
            PeerLostError: a member vanished or stayed silent for too long.
        """

    def close(self) -> None:
        """Give back sockets and memory."""


def private_memory(num_values: int, dtype: torch.dtype, device: torch.device) -> Memory:
    """Memory of this rank alone, where the sum replaces the contribution."""
    flat = torch.zeros(num_values, dtype=dtype, device=device)
    return Memory(flat, flat, slice(0, num_values))
