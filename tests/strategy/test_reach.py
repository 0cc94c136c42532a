"""What lives of a lost rank's learning, held against values that are followed step by step."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from shoal.strategy.sync.gossip import GossipConfig, graph_of
from shoal.strategy.sync.graph import Graph
from shoal.strategy.sync.reach import reached


def sources(graph_at: Callable[[int], Graph], size: int, first: int, last: int) -> list[list[dict[int, int]]]:
    """[step - first][rank]: rank -> how many of its steps are in the values, by forward simulation."""
    now = [{rank: first} for rank in range(size)]
    history = [now]
    for step in range(first, last):
        graph, following = graph_at(step), []
        for rank in range(size):
            mixed = dict(now[rank])
            for neighbour in graph.neighbours(rank):
                for source, steps in now[neighbour].items():
                    mixed[source] = max(steps, mixed.get(source, first))
            mixed[rank] = step + 1
            following.append(mixed)
        now = following
        history.append(now)
    return history


@pytest.mark.parametrize("topology", ["ring", "torus", "exponential", "matching"])
@pytest.mark.parametrize("size", [2, 3, 4, 7])
def test_what_somebody_has_of_a_lost_rank_is_what_mixing_brought_there(topology: str, size: int) -> None:
    def graph_at(step: int) -> Graph:
        return graph_of(GossipConfig(topology=topology), size, step=step)

    first, last = 5, 12
    history = sources(graph_at, size, first, last)
    for lost in range(size):
        standings = {rank: last - rank % 3 for rank in range(size) if rank != lost}
        expected = max(history[steps - first][rank].get(lost, first) for rank, steps in standings.items())
        assert reached(graph_at, first, standings, lost) == expected


def test_without_survivors_or_steps_nothing_is_known() -> None:
    assert reached(lambda _: graph_of(GossipConfig(), 3), 4, {}, 1) == 4
    assert reached(lambda _: graph_of(GossipConfig(), 3), 4, {0: 4, 2: 4}, 1) == 4
