"""The order of samples is a permutation: each index once, whatever the size, and anyone can compute any part of it."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from shoal.data.order import sample_seeds, shuffled


def order(size: int, *, seed: int = 0, epoch: int = 0) -> NDArray[np.int64]:
    return shuffled(np.arange(size, dtype=np.int64), size, seed=seed, epoch=epoch)


def test_each_index_occurs_exactly_once_for_every_size() -> None:
    for size in range(1, 301):
        assert np.array_equal(np.sort(order(size, seed=size, epoch=size % 7)), np.arange(size)), size


@pytest.mark.parametrize("size", [65_536, 65_537, 131_071, 1_000_003])
def test_large_sizes_computed_in_chunks_are_permutations(size: int) -> None:
    seen = np.zeros(size, dtype=bool)
    for positions in np.array_split(np.arange(size, dtype=np.int64), 7):
        seen[shuffled(positions, size, seed=1, epoch=2)] = True
    assert seen.all()


@pytest.mark.parametrize("size", [2**33 + 1, 2**40, 2**52 - 3])
def test_sizes_beyond_memory_stay_inside_and_never_collide(size: int) -> None:
    ends = np.concatenate([np.arange(1000), np.arange(size - 1000, size)])
    indices = shuffled(ends, size, seed=3, epoch=0)
    assert ((indices >= 0) & (indices < size)).all()
    assert len(np.unique(indices)) == len(ends)


@pytest.mark.parametrize("num_chunks", [1, 2, 3, 97, 211])
def test_the_answer_does_not_depend_on_who_asks_for_how_much(num_chunks: int) -> None:
    whole = order(211, seed=5, epoch=1)
    chunks = np.array_split(np.arange(211, dtype=np.int64), num_chunks)
    assert np.array_equal(np.concatenate([shuffled(c, 211, seed=5, epoch=1) for c in chunks]), whole)
    backwards = shuffled(np.arange(211, dtype=np.int64)[::-1], 211, seed=5, epoch=1)
    assert np.array_equal(backwards[::-1], whole)


def test_asking_leaves_the_positions_as_they_were() -> None:
    positions = np.arange(50, dtype=np.int64)
    shuffled(positions, 50, seed=0, epoch=0)
    assert np.array_equal(positions, np.arange(50))


def test_nobody_may_ask_for_nothing_and_get_something() -> None:
    nothing = np.array([], dtype=np.int64)
    assert shuffled(nothing, 10, seed=0, epoch=0).shape == (0,)
    assert sample_seeds(nothing, seed=0, epoch=0).shape == (0,)


def test_each_seed_and_epoch_has_an_order_of_its_own() -> None:
    orders = {tuple(order(20, seed=seed, epoch=epoch)) for seed in range(12) for epoch in range(12)}
    assert len(orders) == 144


@pytest.mark.parametrize("size", [2, 5, 17])
def test_every_index_comes_about_equally_often_at_every_position(size: int) -> None:
    num_orders = 2000
    orders = np.stack([order(size, seed=seed) for seed in range(num_orders)])  # (num_orders, size)
    counts = np.stack([(orders == index).sum(axis=0) for index in range(size)])  # (index, position)
    expected = num_orders / size
    # Each count is binomial: six standard deviations are exceeded by chance once in 5e8 cells.
    assert np.abs(counts - expected).max() < 6 * np.sqrt(expected * (1 - 1 / size))


def test_neighbours_do_not_stay_together() -> None:
    steps = np.diff(order(10_000))
    assert (np.abs(steps) == 1).mean() < 0.002


def test_every_sample_of_every_epoch_has_a_seed_of_its_own() -> None:
    positions = np.arange(1000, dtype=np.int64)
    pairs = [(seed, epoch) for seed in range(5) for epoch in range(5)]
    seeds = np.concatenate([sample_seeds(positions, seed=seed, epoch=epoch) for seed, epoch in pairs])
    assert len(np.unique(seeds)) == len(seeds)


def test_a_sample_seed_does_not_depend_on_its_neighbours() -> None:
    positions = np.arange(100, dtype=np.int64)
    whole = sample_seeds(positions, seed=1, epoch=2)
    single = [sample_seeds(positions[i : i + 1], seed=1, epoch=2)[0] for i in range(100)]
    assert np.array_equal(whole, np.array(single))


@pytest.mark.parametrize("seed", [0, 2**32, 2**63, 2**64 - 1])
def test_seeds_may_be_large(seed: int) -> None:
    assert np.array_equal(np.sort(order(31, seed=seed)), np.arange(31))
