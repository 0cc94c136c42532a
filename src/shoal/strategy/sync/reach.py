"""How much of a lost rank's learning its neighbours have: gossip carries it one edge a step.

After step s a rank's values depend on those that it and its neighbours had before; followed back from everybody who
lives, through the graph of each step, this tells which of the lost rank's values somebody's are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from shoal.strategy.sync.graph import Graph


def reached(graph_at: Callable[[int], Graph], first: int, standings: Mapping[int, int], lost: int) -> int:
    """How many steps of rank `lost` are in the values of those who live; at least `first`.

    Args:
        graph_at: who mixed with whom in step s, counted from 0; asked for steps from `first` on.
        first: the step at which these graphs begin.
        standings: the steps that each living rank has done.
    """
    return max((_seen_by(graph_at, first, rank, steps, lost) for rank, steps in standings.items()), default=first)


def _seen_by(graph_at: Callable[[int], Graph], first: int, rank: int, steps: int, lost: int) -> int:
    sources = {rank}  # whose values after `steps` steps are in `rank`'s
    while steps > first and lost not in sources:
        steps -= 1
        graph = graph_at(steps)
        sources |= {neighbour for source in sources for neighbour in graph.neighbours(source)}
    return steps
