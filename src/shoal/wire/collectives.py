"""Collectives through torch.distributed: Gloo between CPUs, NCCL between GPUs.

`traffic` counts payload: of messages that this module sends itself by their tensors, of the library's collectives by
their algorithms (see traffic.py). Headers and retransmissions are the network's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shoal.errors import PeerLostError
from shoal.ops import AllGather, AllReduce, AllToAll, Barrier, Broadcast, Op, SendRecv
from shoal.wire.traffic import Traffic, messages_of, size_bytes
from shoal.wire.transport import Memory, private_memory


class TorchTransport:
    """One torch.distributed process group. Tensors live on `device`."""

    def __init__(self, members: list[int], rank: int, device: torch.device) -> None:
        """Make the group. Collective over *all* ranks of the job, members or not (torch.distributed asks for that)."""
        self._members = members
        self._rank = rank
        self._device = device
        self._group = dist.new_group(members)
        self.traffic = Traffic()

    def allocate(self, num_values: int, dtype: torch.dtype) -> Memory:
        """Private memory: collectives work in place."""
        return private_memory(num_values, dtype, self._device)

    def perform(self, op: Op) -> Any:
        """Carry out `op`; on a GPU it is enqueued on the current stream."""
        with failures_as_lost_peers(f"{type(op).__name__} over ranks {self._members}"):
            return self._perform(op)

    def _perform(self, op: Op) -> Any:
        size = len(self._members)
        match op:
            case AllReduce(source, target):
                if source is not target:
                    target.copy_(source)
                dist.all_reduce(target, group=self._group)
                self._record_library(op)
            case Broadcast(tensor, root):
                dist.broadcast(tensor, src=self._members[root], group=self._group)
                self._record_library(op)
            case AllToAll(tensor) if tensor.is_cuda:
                received = torch.empty_like(tensor)
                dist.all_to_all_single(received, tensor, group=self._group)
                self._record_library(op)
                return received
            case AllToAll(tensor):
                return self._all_to_all(tensor)
            case AllGather(tensor):
                rows = torch.empty((size, tensor.numel()), dtype=tensor.dtype, device=tensor.device)
                dist.all_gather(list(rows), tensor, group=self._group)
                self._record_library(op)
                return rows
            case SendRecv(tensor, to, into, source):
                self._send_and_receive(tensor, to, into, source)
            case Barrier():
                dist.barrier(group=self._group)
        return None

    def _all_to_all(self, rows: Tensor) -> Tensor:
        """In rounds: in round k everybody sends to the k-th after it and receives from the k-th before.

        Each link then carries one stream each way at any time. Gloo's own all-to-all takes 1.7 times as long on a
        slow network.
        """
        received = torch.empty_like(rows)
        me, size = self._members.index(self._rank), len(self._members)
        received[me] = rows[me]
        for distance in range(1, size):
            to, source = (me + distance) % size, (me - distance) % size
            arriving = dist.irecv(received[source], src=self._members[source], group=self._group)
            leaving = dist.isend(rows[to], dst=self._members[to], group=self._group)
            self.traffic.record([(self._members[to], size_bytes(rows[to]))])
            assert arriving is not None
            assert leaving is not None
            arriving.wait()
            leaving.wait()
        return received

    def _send_and_receive(self, tensor: Any, to: int | None, into: Any, source: int | None) -> None:
        waiting = []
        if source is not None and into.numel():
            waiting.append(dist.irecv(into, src=self._members[source], group=self._group))
        if to is not None and tensor.numel():
            waiting.append(dist.isend(tensor.contiguous(), dst=self._members[to], group=self._group))
            self.traffic.record([(self._members[to], size_bytes(tensor))])
        for work in waiting:
            assert work is not None
            work.wait()

    def _record_library(self, op: Op) -> None:
        self.traffic.record(messages_of(op, self._members.index(self._rank), self._members))

    def close(self) -> None:
        """The process group is destroyed with all others, by `rendezvous.leave`."""


@contextmanager
def failures_as_lost_peers(what: str) -> Iterator[None]:
    """torch.distributed reports a vanished peer as a RuntimeError: name it for what it is.

    Raises:
        PeerLostError: `what` failed.
    """
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise PeerLostError(f"{what} failed, most likely because another rank ended: {reason}") from error


def sum_over_world(values: list[float]) -> list[float]:
    """Sum float64 values over all ranks, on the main thread and torch.distributed's default group."""
    total = torch.tensor(values, dtype=torch.float64)
    with failures_as_lost_peers("summing over all ranks"):
        dist.all_reduce(total)
    summed: list[float] = total.tolist()
    return summed
