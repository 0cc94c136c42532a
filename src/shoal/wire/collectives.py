"""Collectives through torch.distributed: Gloo between CPUs, NCCL between GPUs.

`traffic` counts payload: of messages that this module sends itself by their tensors, of the library's collectives by
their algorithms (see traffic.py). Headers and retransmissions are the network's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shoal.ops import AllGather, AllReduce, AllToAll, Barrier, Broadcast, Op, SendRecv
from shoal.wire import checksum
from shoal.wire.group import Group
from shoal.wire.groups import failures_as_lost_peers
from shoal.wire.traffic import Traffic, messages_of, size_bytes
from shoal.wire.transport import Memory, MemoryPool, private_memory


class TorchTransport:
    """One process group. Tensors live on `device`."""

    def __init__(
        self, group: Group, device: torch.device, *, verify: bool = False, pool: MemoryPool | None = None
    ) -> None:
        """`verify`: a checksum goes with every message that this module sends itself (all but the library's sums).

        `pool`: where memory comes from.
        """
        self._pool = pool
        self._group = group
        self._verify = verify and device.type == "cpu"
        self._members = group.members
        self._device = device
        self.traffic = Traffic()

    @property
    def is_stuck(self) -> bool:
        """Whether a thread waits in vain for a message, although the view was cut."""
        return self._group.is_stuck

    def allocate(self, num_values: int, dtype: torch.dtype) -> Memory:
        """Private memory: collectives work in place."""
        return private_memory(num_values, dtype, self._device, self._pool)

    def perform(self, op: Op) -> Any:
        """Carry out `op`; on a GPU it is enqueued on the current stream."""
        with failures_as_lost_peers(f"{type(op).__name__} over ranks {self._members}"):
            return self._perform(op)

    def _perform(self, op: Op) -> Any:
        group = self._group
        match op:
            case AllReduce(source, target):
                if source is not target:
                    target.copy_(source)
                group.all_reduce(target)
                self._record_library(op)
            case Broadcast(tensor, root):
                group.broadcast(tensor, root)
                self._record_library(op)
            case AllToAll(tensor) if tensor.is_cuda:
                received = torch.empty_like(tensor)
                group.all_to_all(received, tensor)
                self._record_library(op)
                return received
            case AllToAll(tensor):
                return self._all_to_all(tensor)
            case AllGather(tensor):
                return self._all_gather(tensor)
            case SendRecv(tensor, to, into, source):
                self._send_and_receive(tensor, to, into, source)
            case Barrier():
                group.barrier()
        return None

    def _all_gather(self, tensor: Tensor) -> Tensor:
        rows = torch.empty((self._group.size, tensor.numel()), dtype=tensor.dtype, device=tensor.device)
        self._group.all_gather(list(rows), tensor)
        self._record_library(AllGather(tensor, ""))
        if self._verify:
            sums = torch.empty((self._group.size, checksum.NUM_BYTES), dtype=torch.uint8)
            self._group.all_gather(list(sums), checksum.checksum(tensor))
            for member, row, told in zip(self._members, rows, sums, strict=True):
                checksum.check(row, told, f"what rank {member} gave to all")
        return rows

    def _all_to_all(self, rows: Tensor) -> Tensor:
        """In rounds: in round k everybody sends to the k-th after it and receives from the k-th before.

        Each link then carries one stream each way at any time. Gloo's own all-to-all takes 1.7 times as long on a
        slow network.
        """
        received = torch.empty_like(rows)
        me, size = self._group.index, self._group.size
        received[me] = rows[me]
        for distance in range(1, size):
            to, source = (me + distance) % size, (me - distance) % size
            self._send_and_receive(rows[to], to, received[source], source)
        return received

    def _send_and_receive(self, tensor: Any, to: int | None, into: Any, source: int | None) -> None:
        waiting, told = [], None
        if source is not None and into.numel():
            waiting.append(self._group.receive(into, source))
            if self._verify:
                told = checksum.empty()
                waiting.append(self._group.receive(told, source))
        if to is not None and tensor.numel():
            content = tensor.contiguous()
            waiting.append(self._group.send(content, to))
            if self._verify:
                waiting.append(self._group.send(checksum.checksum(content), to))
            self.traffic.record([(self._members[to], size_bytes(tensor))])
        for work in waiting:
            work.wait()
        if told is not None and source is not None:
            checksum.check(into, told, f"a message from rank {self._members[source]}")

    def _record_library(self, op: Op) -> None:
        self.traffic.record(messages_of(op, self._group.index, self._members))

    def close(self) -> None:
        """Let go of the process group."""
