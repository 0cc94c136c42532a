"""Graphs of a decentralised cluster: who talks to whom, in which rounds, and with which weights.

Weights are Metropolis-Hastings' (Xiao and Boyd 2004): w_ij = 1 / (1 + max(degree_i, degree_j)), and what is left stays
with i itself. The matrix is symmetric and its rows sum to 1, so mixing keeps the mean.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shoal.errors import PlanError

Edge = tuple[int, int]


@dataclass(frozen=True)
class Graph:
    """An undirected graph over ranks 0 .. size - 1; each edge once, the lower rank first."""

    size: int
    edges: frozenset[Edge]

    @classmethod
    def of(cls, size: int, pairs: Iterable[Sequence[int]]) -> Graph:
        """From any pairs of ranks; a rank with itself is no edge."""
        return cls(size, frozenset((min(a, b), max(a, b)) for a, b in pairs if a != b))

    def neighbours(self, rank: int) -> list[int]:
        """The ranks that `rank` talks to, ascending."""
        return sorted({b if a == rank else a for a, b in self.edges if rank in (a, b)})

    def weight(self, one: int, other: int) -> float:
        """The part of `other`'s values in `one`'s next ones, and the other way round."""
        return 1 / (1 + max(len(self.neighbours(one)), len(self.neighbours(other))))

    def rounds(self) -> list[list[Edge]]:
        """The edges in rounds of pairs, none of which shares a rank with another: a greedy edge colouring."""
        rounds: list[list[Edge]] = []
        for edge in sorted(self.edges):
            free = (r for r in rounds if not any(set(edge) & set(other) for other in r))
            place = next(free, None)
            if place is None:
                rounds.append(place := [])
            place.append(edge)
        return rounds

    def unreached(self) -> list[int]:
        """The ranks that nothing from rank 0 ever reaches."""
        reached, frontier = {0}, [0]
        while frontier:
            frontier = [n for rank in frontier for n in self.neighbours(rank) if n not in reached]
            frontier = sorted(set(frontier))
            reached.update(frontier)
        return [rank for rank in range(self.size) if rank not in reached]


def ring(size: int) -> Graph:
    """Each rank with the next."""
    return Graph.of(size, [(rank, (rank + 1) % size) for rank in range(size)])


def torus(size: int) -> Graph:
    """A grid as square as the number of ranks allows, closed in both directions."""
    rows = next(r for r in range(math.isqrt(size), 0, -1) if size % r == 0)
    columns = size // rows
    right = [(r, r // columns * columns + (r + 1) % columns) for r in range(size)]
    down = [(r, (r + columns) % size) for r in range(size)]
    return Graph.of(size, right + down)


def exponential(size: int) -> Graph:
    """Each rank with those 1, 2, 4, ... places on (Assran et al. 2019)."""
    hops = [1 << k for k in range(max(1, (size - 1).bit_length())) if 1 << k < size]
    return Graph.of(size, [(rank, (rank + hop) % size) for rank in range(size) for hop in hops])


def matching(size: int, *, seed: int, step: int) -> Graph:
    """Random pairs, drawn anew for each step; with an odd number one rank stays alone."""
    ranks = list(range(size))
    random.Random(f"{seed}/{step}").shuffle(ranks)
    return Graph.of(size, zip(ranks[::2], ranks[1::2], strict=False))


def declared(size: int, edges: Sequence[Sequence[int]]) -> Graph:
    """The user's own edges.

    Raises:
        PlanError: a rank that does not exist, or a graph in more than one piece.
    """
    strangers = sorted({rank for edge in edges for rank in edge if not 0 <= rank < size})
    if strangers:
        raise PlanError(f"sync.edges names rank {strangers[0]}, but there are ranks 0 to {size - 1}")
    graph = Graph.of(size, edges)
    unreached = graph.unreached()
    if unreached:
        raise PlanError(
            f"sync.edges does not connect the ranks: nothing from rank 0 reaches rank {unreached[0]}; add an edge "
            "between the pieces, or take topology ring, torus or exponential"
        )
    return graph
