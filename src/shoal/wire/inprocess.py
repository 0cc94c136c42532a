"""The interpreter for tests: plays all ranks in one process and thread, in lockstep.

It holds every exchange to its word: an operation is performed only when all members of its group have come to the same
one, and ranks that wait for each other for ever are an error that names what each waits for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from shoal.ops import AllGather, AllReduce, AllToAll, Barrier, Broadcast, Exchange, Op

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
    waiting: dict[int, Op] = {}
    results: list[Any] = [None] * len(exchanges)
    for rank, exchange in enumerate(exchanges):
        _advance(rank, exchange, None, waiting, results)
    while waiting:
        ready = next((r for r, op in waiting.items() if _complete(members(r, op.group), waiting, op)), None)
        assert ready is not None, f"ranks wait for each other: {waiting}"
        group = members(ready, waiting[ready].group)
        ops = [waiting.pop(rank) for rank in group]
        for rank, answer in zip(group, _perform(ops), strict=True):
            _advance(rank, exchanges[rank], answer, waiting, results)
    return results


def _advance(rank: int, exchange: Exchange, answer: Any, waiting: dict[int, Op], results: list[Any]) -> None:
    try:
        waiting[rank] = exchange.send(answer)
    except StopIteration as stop:
        results[rank] = stop.value


def _complete(group: Sequence[int], waiting: dict[int, Op], op: Op) -> bool:
    return all(rank in waiting and waiting[rank].group == op.group for rank in group)


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
