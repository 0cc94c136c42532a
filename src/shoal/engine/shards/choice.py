"""Which state the ranks of a new view go on from, who has which shard of it, and who keeps copies for whom.

Pure decisions on plain values, the same on every rank. A state is named by the view that it belongs to, its step and
the number of shards into which it is divided; it is complete if some rank holds each of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Key(NamedTuple):
    """A state's name, in the order in which states are preferred: the newest view's, and of these the furthest."""

    epoch: int
    step: int
    shards: int


@dataclass(frozen=True)
class Label:
    """One shard of a state.

    Attributes:
        epoch: of the view that the state belongs to.
        step: committed steps.
        count: shards of the state; `index`: this one's place among them.
        is_committed: False: the holder has all that the last step's update needs, and does not know whether others
            took it.
    """

    epoch: int
    step: int
    count: int
    index: int
    is_committed: bool = True

    @property
    def key(self) -> Key:
        """The state's name."""
        return Key(self.epoch, self.step, self.count)


@dataclass(frozen=True)
class Choice:
    """A complete state. `holders[i]`: the ranks that hold shard i."""

    key: Key
    holders: tuple[tuple[int, ...], ...]

    @property
    def teller(self) -> int:
        """The rank that tells what all shards have in common."""
        return self.holders[0][0]

    def giver(self, index: int, taker: int) -> int:
        """From whom `taker` has shard `index`: from itself if it can; else each taker from another holder."""
        holders = self.holders[index]
        return taker if taker in holders else holders[taker % len(holders)]


def choose(told: Sequence[Sequence[Label]]) -> Choice | None:
    """The state to go on from; None if none is complete.

    Args:
        told: by rank, what it holds.
    """
    return next(complete(told), None)


def complete(told: Sequence[Sequence[Label]]) -> Iterator[Choice]:
    """All complete states, the best first."""
    committed = {label.key for labels in told for label in labels if label.is_committed}
    for key in sorted(committed, reverse=True):
        holders = _holders(told, key)
        if all(holders):
            yield Choice(key, holders)


def furthest(told: Sequence[Sequence[Label]]) -> Key | None:
    """The last state that anybody committed in the newest view, complete or not; None if nobody holds anything."""
    return max((label.key for labels in told for label in labels if label.is_committed), default=None)


def missing(told: Sequence[Sequence[Label]], key: Key) -> list[int]:
    """The shards of a state that nobody holds."""
    return [index for index, holders in enumerate(_holders(told, key)) if not holders]


def _holders(told: Sequence[Sequence[Label]], key: Key) -> tuple[tuple[int, ...], ...]:
    found: list[dict[int, None]] = [{} for _ in range(key.shards)]
    for rank, labels in enumerate(told):
        for label in labels:
            if label.key == key:
                found[label.index][rank] = None
    return tuple(tuple(ranks) for ranks in found)


def keepers(nodes: Sequence[str]) -> list[int]:
    """For each rank who keeps a copy of its shard: a rank of the next node; on one node alone, its next rank.

    Args:
        nodes: by rank, the name of its node; more ranks than one.
    """
    by_node: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        by_node.setdefault(node, []).append(rank)
    order = list(by_node)
    if len(order) == 1:
        return [(rank + 1) % len(nodes) for rank in range(len(nodes))]
    found = []
    for rank, node in enumerate(nodes):
        beyond = by_node[order[(order.index(node) + 1) % len(order)]]
        found.append(beyond[by_node[node].index(rank) % len(beyond)])
    return found


def heirs(indices: Sequence[int], staying: Collection[int]) -> dict[int, int]:
    """Who gets whose shard when ranks leave as planned: leaver -> a rank that stays. Each shard goes on once.

    Args:
        indices: by rank, the shard that it holds.
        staying: the ranks that go on; if there are none, nobody gets anything.
    """
    stay = sorted(staying)
    safe = {indices[rank] for rank in stay}
    found: dict[int, int] = {}
    for rank, index in enumerate(indices):
        if stay and index not in safe:
            found[rank] = stay[len(found) % len(stay)]
            safe.add(index)
    return found
