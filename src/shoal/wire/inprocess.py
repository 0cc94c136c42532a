"""The interpreter for tests: plays all ranks in one process and thread, in lockstep.

It holds every exchange to its word: an operation is performed only when all members of its group have come to the same
one, and ranks that wait for each other for ever are an error that names what each waits for.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from shoal.ops import AllGather, AllReduce, AllToAll, Barrier, Broadcast, Exchange, Op, SendRecv

Members = Callable[[int, str], Sequence[int]]
"""(rank, group) -> the global ranks of that group as this rank sees it, ascending."""


def run_in_process(exchanges: Sequence[Exchange], members: Members) -> list[Any]:
    """Run one exchange a rank to the end.

    Args:
        exchanges: in order of rank.
        members: who is in a group, e.g. `lambda rank, group: topologies[rank].members(group)`.

    Returns:
        What each exchange returned.

    Raises:
        AssertionError: ranks came to different operations, or wait for each other.
    """
    players = _Players(list(exchanges), members)
    while players.waiting:
        assert players.step(), f"ranks wait for each other: {players.waiting}"
    return players.results


class _Players:
    """All ranks, each at the operation it has come to."""

    def __init__(self, exchanges: list[Exchange], members: Members) -> None:
        self._exchanges = exchanges
        self._members = members
        self._mail: dict[tuple[int, int], deque[torch.Tensor]] = defaultdict(deque)  # (from, to) -> messages
        self.waiting: dict[int, Op] = {}
        self.results: list[Any] = [None] * len(exchanges)
        for rank in range(len(exchanges)):
            self._advance(rank, None)

    def step(self) -> bool:
        """Perform one operation; False if none can be."""
        for rank, op in self.waiting.items():
            group = self._members(rank, op.group)
            if isinstance(op, SendRecv):
                if op.source is None or self._mail[group[op.source], rank]:
                    self._receive(rank, op, group)
                    return True
            elif all(r in self.waiting and self.waiting[r].group == op.group for r in group):
                ops = [self.waiting.pop(r) for r in group]
                for r, answer in zip(group, _perform(ops), strict=True):
                    self._advance(r, answer)
                return True
        return False

    def _receive(self, rank: int, op: SendRecv, group: Sequence[int]) -> None:
        del self.waiting[rank]
        if op.source is not None:
            op.into.copy_(self._mail[group[op.source], rank].popleft())
        self._advance(rank, None)

    def _advance(self, rank: int, answer: Any) -> None:
        try:
            op = self.waiting[rank] = self._exchanges[rank].send(answer)
        except StopIteration as stop:
            self.results[rank] = stop.value
            return
        if isinstance(op, SendRecv) and op.to is not None:
            self._mail[rank, self._members(rank, op.group)[op.to]].append(op.tensor.clone())


def _perform(ops: list[Op]) -> list[Any]:
    kinds = {type(op) for op in ops}
    assert len(kinds) == 1, f"ranks of one group came to different operations: {kinds}"
    match ops[0]:
        case AllReduce():
            total = torch.stack([op.source for op in ops if isinstance(op, AllReduce)]).sum(dim=0)
            for op in ops:
                assert isinstance(op, AllReduce)
                op.target.copy_(total)
        case Broadcast(_, root):
            value = _tensor(ops[root]).clone()
            for op in ops:
                _tensor(op).copy_(value)
        case AllToAll():
            return [torch.stack([_tensor(op)[index] for op in ops]) for index in range(len(ops))]
        case AllGather():
            return [torch.stack([_tensor(op) for op in ops])] * len(ops)
        case Barrier():
            pass
    return [None] * len(ops)


def _tensor(op: Op) -> torch.Tensor:
    assert isinstance(op, Broadcast | AllToAll | AllGather)
    assert isinstance(op.tensor, torch.Tensor)
    return op.tensor
