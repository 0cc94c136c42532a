"""All ranks in a grid: one axis for each way to divide the work, quiet ones first.

Ranks are seated node by node, so that neighbours on the last axes share a node: the talkative axes (tensor, then shard)
lie inside nodes as far as nodes are large enough, the quiet ones (pipeline, then replicate) across.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from shoal.strategy.layout.config import LayoutConfig
from shoal.strategy.topology import Topology

AXES = ("replicate", "pipeline", "shard", "tensor")
WITHIN = ("pipeline", "shard", "tensor")
"""The axes along which one replica lies."""


@dataclass(frozen=True)
class Grid:
    """Every rank's place.

    Attributes:
        sizes: of AXES, in their order.
        ranks: global ranks, row by row.
    """

    sizes: tuple[int, ...]
    ranks: tuple[int, ...]

    @property
    def by_axis(self) -> dict[str, int]:
        """The sizes by name."""
        return dict(zip(AXES, self.sizes, strict=True))

    def size(self, axis: str) -> int:
        """Ranks along one axis."""
        return self.sizes[AXES.index(axis)]

    def index(self, rank: int, axis: str) -> int:
        """Where `rank` stands on one axis."""
        seat = self.ranks.index(rank)
        place = AXES.index(axis)
        return seat // math.prod(self.sizes[place + 1 :]) % self.sizes[place]

    def group(self, rank: int, *axes: str) -> list[int]:
        """The ranks that differ from `rank` on these axes only, in the grid's order."""
        fixed = [axis for axis in AXES if axis not in axes]
        here = [self.index(rank, axis) for axis in fixed]
        return [other for other in self.ranks if [self.index(other, axis) for axis in fixed] == here]

    def groups(self, *axes: str) -> list[list[int]]:
        """All such groups; each rank is in one."""
        found = (self.group(rank, *axes) for rank in self.ranks)
        return [list(group) for group in dict.fromkeys(map(tuple, found))]

    def feed(self, rank: int) -> int:
        """Whose samples a rank takes: ranks of one tensor and pipeline group take the same, 0 <= feed < feeds."""
        return self.index(rank, "replicate") * self.size("shard") + self.index(rank, "shard")

    def dice(self, rank: int) -> int:
        """Whose random numbers a rank draws: the same on all ranks of a tensor group, different on any others."""
        return self.feed(rank) + self.feeds * self.index(rank, "pipeline")

    @property
    def feeds(self) -> int:
        """Into how many parts a global batch is divided."""
        return self.size("replicate") * self.size("shard")


def arrange(config: LayoutConfig, nodes: Sequence[str]) -> Grid:
    """Seat the ranks node by node; `nodes[r]` is the name of rank r's node."""
    sizes = (config.replicate or 1, config.pipeline, config.shard, config.tensor)
    order = {name: place for place, name in enumerate(dict.fromkeys(nodes))}
    return Grid(sizes, tuple(sorted(range(len(nodes)), key=lambda rank: (order[nodes[rank]], rank))))


def sharded_over(num_ranks: int, least: int) -> tuple[int, int]:
    """(replicate, shard) for so many ranks: as many replicas as leave each rank no more than 1 / `least` of one.

    With fewer ranks than `least`, all of them together hold one replica, and each holds more than it was planned to.
    """
    shard = next((size for size in range(least, num_ranks) if num_ranks % size == 0), num_ranks)
    return num_ranks // shard, shard


def replicas(grid: Grid, topology: Topology) -> Topology:
    """This rank's place among those that hold the same part of the other replicas."""
    peers = grid.group(topology.rank, "replicate")
    return Topology(peers.index(topology.rank), tuple(topology.nodes[peer] for peer in peers))


def explain(grid: Grid, nodes: Sequence[str]) -> list[str]:
    """Where each axis longer than 1 came to lie, and why: one sentence each, the talkative first."""
    sentences = []
    for axis, size in reversed(list(zip(AXES, grid.sizes, strict=True))):
        if size == 1:
            continue
        groups = grid.groups(axis)
        crossing = sum(len({nodes[rank] for rank in group}) > 1 for group in groups)
        where = "inside nodes" if not crossing else "across nodes"
        if 0 < crossing < len(groups):
            where = f"across nodes in {crossing} of {len(groups)} groups"
        sentences.append(f"{axis} = {size} lies {where}: {_REASONS[axis]}")
    return sentences


_REASONS = {
    "tensor": "it talks several times in every layer, so it is seated first",
    "shard": "it fetches every layer in forward and backward, so it is seated next",
    "pipeline": "it only hands activations on, so it is seated after tensor and shard",
    "replicate": "it only keeps replicas in agreement, so it takes the links that are left",
}


def nearest_products(config: LayoutConfig, world_size: int, *, limit: int = 3) -> list[dict[str, int]]:
    """Sizes of the axes that do equal `world_size`, nearest to the plan's first."""
    wanted = [config.replicate or 1, config.pipeline, config.shard, config.tensor]
    divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
    fitting = [sizes for sizes in itertools.product(divisors, repeat=4) if math.prod(sizes) == world_size]
    # An axis that the plan leaves alone stays alone if that is possible.
    fitting.sort(
        key=lambda sizes: [sum(s > 1 for s, w in zip(sizes, wanted, strict=True) if w == 1), _far(sizes, wanted)]
    )
    return [dict(zip(AXES, sizes, strict=True)) for sizes in fitting[:limit]]


def _opened(sizes: Sequence[int], wanted: Sequence[int]) -> int:
    return sum(size > 1 for size, want in zip(sizes, wanted, strict=True) if want == 1)


def _far(sizes: Sequence[int], wanted: Sequence[int]) -> float:
    return sum(abs(math.log(size / want)) for size, want in zip(sizes, wanted, strict=True))
