"""Which ranks share a node."""

from __future__ import annotations

from shoal.ops import LEADERS, NODE, WORLD
from shoal.strategy.topology import topologies


def test_every_rank_sees_its_own_node_and_all_see_the_same_leaders() -> None:
    views = topologies("abab")
    assert [view.members(NODE) for view in views] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [view.members(LEADERS) for view in views] == [[0, 1]] * 4
    assert [view.members(WORLD) for view in views] == [[0, 1, 2, 3]] * 4
    assert [view.is_leader for view in views] == [True, True, False, False]


def test_a_rank_alone_on_its_node_knows_that_others_have_neighbours() -> None:
    assert [view.has_neighbours for view in topologies("aab")] == [True] * 3
    assert [view.has_neighbours for view in topologies("abc")] == [False] * 3
