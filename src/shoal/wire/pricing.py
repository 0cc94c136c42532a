"""The interpreter that performs nothing: walks the exchanges of all ranks and says what each would send, and when.

Tensors lie on the device `meta`: they have shapes and no values, so a model of any size is priced in no memory. The
generators are those that the engine performs, and the sizes those that `traffic.py` gives for each operation; a
prediction can differ from a run only where a run's operations depend on values, which no exchange's do.

`seconds` puts rounds on links. Its assumptions:

- What can leave at the same time does: a round is all operations that no rank has to wait for. The next begins when the
  last byte has arrived.
- A round takes as long as its busiest node: all that the node sends over its one link, or all that it receives (both
  directions at once), over the link's rate. The network between the links is never the bottleneck.
- Each message to another node costs a latency more, and those of one rank in one operation follow each other.
- Bytes are payload; headers take none of the rate. Between ranks of one node nothing takes time, nor does computing:
  encoding, decoding and summing are free.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shoal.ops import NODE, AllGather, AllToAll, Exchange, Op, SendRecv
from shoal.wire.traffic import Traffic, messages_of

Members = Callable[[int, str], Sequence[int]]
"""(rank, group) -> the global ranks of that group as this rank sees it, ascending."""

Round = tuple[tuple[int, int, int], ...]
"""What leaves at the same time: (from rank, to rank, bytes)."""

IN_SHARED_MEMORY = frozenset({NODE})


@dataclass(frozen=True)
class Links:
    """Where ranks are and how fast their nodes' links are.

    Attributes:
        nodes: the name of each rank's node.
        rates_bytes_per_s: by node, in each direction; a node that is left out has no limit.
        latency_s: of one message between two nodes.
    """

    nodes: Sequence[str]
    rates_bytes_per_s: Mapping[str, float]
    latency_s: float


def price_rank(
    exchange: Exchange, rank: int, members: Members, *, silent: Collection[str] = IN_SHARED_MEMORY
) -> Traffic:
    """What one rank sends in an exchange; the others' need not be there.

    Args:
        silent: groups whose members share memory, so that nothing is sent.
    """
    traffic = Traffic()
    answer: Any = None
    while True:
        try:
            op = exchange.send(answer)
        except StopIteration:
            return traffic
        group = members(rank, op.group)
        if op.group not in silent:
            traffic.record(messages_of(op, group.index(rank), group))
        answer = _answer(op, len(group))


def rounds_of(
    exchanges: Sequence[Exchange], members: Members, *, silent: Collection[str] = IN_SHARED_MEMORY
) -> list[Round]:
    """Walk one exchange a rank to the end; rounds in which nobody sends are left out.

    Args:
        exchanges: in order of rank.
        silent: as for `price_rank`.

    Raises:
        AssertionError: ranks came to different operations, or wait for each other.
    """
    walk = _Walk(exchanges, members, silent)
    rounds = []
    while walk.waiting:
        if sent := walk.round():
            rounds.append(sent)
    return rounds


def traffic_of(rounds: Sequence[Round], world_size: int) -> list[Traffic]:
    """What each rank sends in all rounds."""
    traffic = [Traffic() for _ in range(world_size)]
    for sender, to, size_bytes in (message for round_ in rounds for message in round_):
        traffic[sender].record([(to, size_bytes)])
    return traffic


def seconds(rounds: Sequence[Round], links: Links) -> float:
    """How long the rounds take one after the other: see the assumptions at the top of this page."""
    return sum(_round_seconds(round_, links) for round_ in rounds)


def _round_seconds(messages: Round, links: Links) -> float:
    ways: Counter[tuple[str, str]] = Counter()  # (node, direction) -> bytes
    in_a_row: Counter[int] = Counter()
    for sender, to, size_bytes in messages:
        here, there = links.nodes[sender], links.nodes[to]
        if here != there:
            ways[here, "out"] += size_bytes
            ways[there, "in"] += size_bytes
            in_a_row[sender] += 1
    rates = links.rates_bytes_per_s
    busiest = max((carried / rates[node] for (node, _), carried in ways.items() if node in rates), default=0.0)
    return busiest + links.latency_s * max(in_a_row.values(), default=0)


class _Walk:
    """All ranks, each at the operation it has come to; all that can be done is done at once."""

    def __init__(self, exchanges: Sequence[Exchange], members: Members, silent: Collection[str]) -> None:
        self._exchanges = exchanges
        self._members = members
        self._silent = silent
        self._mail: Counter[tuple[int, int]] = Counter()  # (from, to) -> messages that have left and not been taken
        self._leaving: list[tuple[int, int, int]] = []
        self.waiting: dict[int, Op] = {}
        for rank in range(len(exchanges)):
            self._advance(rank, None)

    def round(self) -> Round:
        """Perform what can be; return what was sent."""
        ready = [rank for rank in self.waiting if self._is_ready(rank)]
        assert ready, f"ranks wait for each other: {self.waiting}"
        for rank in ready:
            if not isinstance(self.waiting[rank], SendRecv):
                self._send(rank, self.waiting[rank])
        sent, self._leaving = tuple(self._leaving), []
        for rank, op in [(rank, self.waiting.pop(rank)) for rank in ready]:
            group = self._members(rank, op.group)
            if isinstance(op, SendRecv) and op.source is not None:
                self._mail[group[op.source], rank] -= 1
            self._advance(rank, _answer(op, len(group)))
        return sent

    def _is_ready(self, rank: int) -> bool:
        op = self.waiting[rank]
        group = self._members(rank, op.group)
        if isinstance(op, SendRecv):
            return op.source is None or self._mail[group[op.source], rank] > 0
        others = [self.waiting.get(other) for other in group]
        if any(other is None or other.group != op.group for other in others):
            return False
        kinds = {type(other) for other in others}
        assert len(kinds) == 1, f"ranks of one group came to different operations: {kinds}"
        return True

    def _advance(self, rank: int, answer: Any) -> None:
        try:
            op = self.waiting[rank] = self._exchanges[rank].send(answer)
        except StopIteration:
            return
        if isinstance(op, SendRecv) and op.to is not None:  # it leaves at once, whatever it waits for itself
            self._mail[rank, self._members(rank, op.group)[op.to]] += 1
            self._send(rank, op)

    def _send(self, rank: int, op: Op) -> None:
        group = self._members(rank, op.group)
        if op.group not in self._silent:
            self._leaving += [(rank, *message) for message in messages_of(op, group.index(rank), group)]


def _answer(op: Op, size: int) -> Any:
    """What an operation results in: the right shape and no values."""
    match op:
        case AllToAll(tensor):
            return tensor.new_empty(tensor.shape)
        case AllGather(tensor):
            return tensor.new_empty((size, tensor.numel()))
        case _:
            return None
