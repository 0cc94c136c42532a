"""Dividing loses nothing, and gives everybody their share to within one."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.data.partition import divide, spans, steps_per_epoch

TOTALS = st.integers(0, 10**9)
WEIGHTS = st.lists(st.floats(0, 1e6), min_size=1, max_size=17).filter(lambda weights: sum(weights) > 0)


@given(TOTALS, WEIGHTS)
def test_counts_sum_to_the_total_and_are_within_one_of_the_exact_share(total: int, weights: list[float]) -> None:
    counts = divide(total, weights)
    whole = sum(map(Fraction, weights))
    assert sum(counts) == total
    assert all(count >= 0 for count in counts)
    # A millionth is left for rounding: exact shares are computed in float64.
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - total * Fraction(weight) / whole) < 1 + Fraction(1, 10**6)


@given(TOTALS, WEIGHTS)
def test_spans_follow_each_other_from_first_to_last(total: int, weights: list[float]) -> None:
    pieces = spans(total, weights)
    assert pieces[0].start == 0
    assert pieces[-1].stop == total
    assert all(one.stop == other.start for one, other in itertools.pairwise(pieces))
    assert [len(piece) for piece in pieces] == divide(total, weights)


@pytest.mark.parametrize("total", [0, 1, 2, 7, 64, 97])
@pytest.mark.parametrize("parts", [1, 2, 3, 7, 64])
def test_equal_weights_give_equal_counts_and_the_first_take_the_rest(total: int, parts: int) -> None:
    counts = divide(total, [1.0] * parts)
    assert counts == sorted(counts, reverse=True)
    assert max(counts) - min(counts) <= 1


@given(TOTALS, st.lists(st.integers(0, 100), min_size=1, max_size=9).filter(any), st.sampled_from([0.25, 2, 1024]))
def test_only_proportions_count(total: int, weights: list[int], factor: float) -> None:
    assert divide(total, weights) == divide(total, [weight * factor for weight in weights])


@given(st.integers(0, 10**6), WEIGHTS)
def test_a_weight_of_zero_gets_nothing(total: int, weights: list[float]) -> None:
    assert divide(total, [0.0, *weights, 0.0])[:: len(weights) + 1] == [0, 0]


@pytest.mark.parametrize("weights", [[5e-324, 5e-324], [1e-300, 2e-300, 1e-300], [1e300, 1.0, 1e300]])
def test_weights_may_be_very_small_or_very_large(weights: list[float]) -> None:
    assert sum(divide(101, weights)) == 101


@given(st.integers(0, 500), st.integers(1, 500))
def test_the_steps_of_an_epoch_cover_every_sample_once(num_samples: int, batch_size: int) -> None:
    sizes = [min(batch_size, num_samples - first) for first in range(0, num_samples, batch_size)]
    assert steps_per_epoch(num_samples, batch_size, drop_last=False) == len(sizes)
    assert steps_per_epoch(num_samples, batch_size, drop_last=True) == sizes.count(batch_size)
