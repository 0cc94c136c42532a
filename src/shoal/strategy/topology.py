"""Which ranks share a node: the shape of the cluster as one rank sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.ops import LEADERS, NODE, WORLD


@dataclass(frozen=True)
class Topology:
    """One rank's place. `nodes[r]` is the name of rank r's node."""

    rank: int
    nodes: tuple[str, ...]

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return len(self.nodes)

    @property
    def node_names(self) -> list[str]:
        """Each node once, in order of its first rank."""
        return list(dict.fromkeys(self.nodes))

    @property
    def local_ranks(self) -> list[int]:
        """The global ranks on this rank's node, ascending."""
        return [rank for rank, node in enumerate(self.nodes) if node == self.nodes[self.rank]]

    @property
    def leaders(self) -> list[int]:
        """The first global rank of each node."""
        return [self.nodes.index(name) for name in self.node_names]

    @property
    def is_leader(self) -> bool:
        """Whether this rank speaks for its node."""
        return self.rank in self.leaders

    @property
    def has_neighbours(self) -> bool:
        """Whether any node, not only this rank's, holds more than one rank."""
        return len(self.node_names) < self.world_size

    def members(self, group: str) -> list[int]:
        """The global ranks of a named group, as this rank sees it."""
        return {WORLD: list(range(self.world_size)), NODE: self.local_ranks, LEADERS: self.leaders}[group]


def topologies(nodes: Sequence[str]) -> list[Topology]:
    """The view of every rank, for the interpreters that play all of them."""
    return [Topology(rank, tuple(nodes)) for rank in range(len(nodes))]
