"""Who goes on from what: a state is chosen only if every shard of it is held, and somebody committed it."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from shoal.engine.shards.choice import Key, Label, choose, furthest, heirs, keepers, missing
from shoal.strategy.layout.grid import sharded_over

LABELS = st.integers(1, 3).flatmap(
    lambda count: st.builds(
        Label,
        epoch=st.integers(1, 2),
        step=st.integers(0, 2),
        count=st.just(count),
        index=st.integers(0, count - 1),
        is_committed=st.booleans(),
    )
)
TOLD = st.lists(st.lists(LABELS, max_size=4), min_size=1, max_size=5)


@given(TOLD)
def test_what_is_chosen_is_whole_and_the_best_that_is(told: list[list[Label]]) -> None:
    labels = {label for of_rank in told for label in of_rank}
    whole = {
        label.key
        for label in labels
        if label.is_committed and {other.index for other in labels if other.key == label.key} == set(range(label.count))
    }
    choice = choose(told)
    assert (choice.key if choice else None) == max(whole, default=None)
    if choice is not None:
        assert not missing(told, choice.key)
        for index, ranks in enumerate(choice.holders):
            assert ranks
            for rank in ranks:
                assert any(label.key == choice.key and label.index == index for label in told[rank])
            for taker in range(len(told)):
                assert choice.giver(index, taker) in ranks
                assert (choice.giver(index, taker) == taker) == (taker in ranks), "nobody is sent what it has"


def test_live_shards_of_two_replicas_make_up_for_one_that_is_lost() -> None:
    live = [Label(3, 70, 2, 0), Label(3, 70, 2, 1), Label(3, 70, 2, 0)]  # rank 3, which had shard 1, is gone
    choice = choose([[label] for label in live])
    assert choice is not None
    assert choice.key == Key(3, 70, 2)
    assert choice.holders == ((0, 2), (1,))


def test_without_a_live_holder_the_newest_copies_that_are_complete_count() -> None:
    """Three of four are left. The copies of step 60 had not all arrived when the fourth died; those of 50 had."""
    told = [
        [Label(1, 63, 4, 0), Label(1, 50, 4, 0), Label(1, 50, 4, 3), Label(1, 60, 4, 0)],
        [Label(1, 63, 4, 1), Label(1, 50, 4, 1), Label(1, 50, 4, 0), Label(1, 60, 4, 1), Label(1, 60, 4, 0)],
        [Label(1, 63, 4, 2), Label(1, 50, 4, 2), Label(1, 50, 4, 1), Label(1, 60, 4, 2)],
    ]
    choice = choose(told)
    assert choice is not None
    assert choice.key == Key(1, 50, 4)
    assert furthest(told) == Key(1, 63, 4)
    assert missing(told, Key(1, 63, 4)) == [3]


def test_an_update_that_one_rank_took_the_others_take_too_and_one_that_nobody_took_nobody_does() -> None:
    waiting = [Label(1, 8, 2, 1), Label(1, 9, 2, 1, is_committed=False)]
    taken = choose([[Label(1, 9, 2, 0)], waiting])
    assert taken is not None
    assert taken.key.step == 9
    left = choose([[Label(1, 8, 2, 0), Label(1, 9, 2, 0, is_committed=False)], waiting])
    assert left is not None
    assert left.key.step == 8


def test_a_newer_view_counts_more_than_a_further_step_of_one_that_was_given_up() -> None:
    back, on = [Label(1, 100, 2, 0), Label(1, 100, 2, 1)], [Label(2, 95, 1, 0)]
    choice = choose([back, on])
    assert choice is not None
    assert choice.key == Key(2, 95, 1)


@given(st.lists(st.sampled_from("abc"), min_size=2, max_size=8))
def test_copies_lie_on_another_node_if_there_is_one_and_no_node_keeps_for_two(nodes: list[str]) -> None:
    found = keepers(nodes)
    pairs = Counter((nodes[rank], nodes[keeper]) for rank, keeper in enumerate(found))
    for rank, keeper in enumerate(found):
        assert keeper != rank
        assert nodes[keeper] != nodes[rank] or len(set(nodes)) == 1
    assert len({kept for kept, _ in pairs}) == len({keeping for _, keeping in pairs}) == len(set(nodes))


@given(st.integers(1, 3), st.integers(1, 3), st.data())
def test_no_shard_leaves_with_its_rank(replicate: int, shard: int, data: st.DataObject) -> None:
    indices = list(range(shard)) * replicate
    staying = data.draw(st.sets(st.sampled_from(range(len(indices))), min_size=1))
    given_away = heirs(indices, staying)
    assert not set(given_away) & staying
    assert set(given_away.values()) <= staying
    held = [indices[rank] for rank in (*staying, *given_away)]
    assert set(held) == set(range(shard))
    assert len({indices[leaver] for leaver in given_away}) == len(given_away), "each goes on once"


@given(st.integers(1, 40), st.integers(1, 10))
def test_a_rank_holds_no_more_than_planned_as_long_as_there_are_enough(num_ranks: int, least: int) -> None:
    replicate, shard = sharded_over(num_ranks, least)
    assert replicate * shard == num_ranks
    assert shard >= min(least, num_ranks)
    fewer = [size for size in range(least, shard) if num_ranks % size == 0]
    assert not fewer, "there would be room for more replicas"
