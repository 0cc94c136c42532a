"""Shares follow speeds: exactly where speeds are known, soon where they are measured, and never after noise."""

from __future__ import annotations

import itertools
import json
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.data.balance import BalanceConfig, Balancer, best_counts, shrunk
from shoal.data.partition import divide
from shoal.errors import PlanError

CONFIG = BalanceConfig()
SPEEDS = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=6)


@dataclass
class History:
    """What happened to a simulated cluster: the steps after which shares changed, and each step's efficiency."""

    changes: list[int]
    counts: list[list[int]]
    efficiency: list[float]


def simulate(
    speeds: Callable[[int], Sequence[float]],
    *,
    steps: int,
    seed: int,
    noise: float = 0.15,
    batch_size: int = 256,
    overhead: float = 0.0,
    disturb: Callable[[int, int], float] = lambda step, rank: 1.0,
) -> History:
    """Train on ranks of given speeds (samples a second, at each step) with lognormal noise.

    The efficiency is of the shares themselves, without noise: the time of the best shares over that of the actual.
    """
    draw, balancer = random.Random(seed), Balancer(len(speeds(0)), batch_size, CONFIG)
    history = History([], [], [])
    for step in range(1, steps + 1):
        now, counts = speeds(step), balancer.counts
        times = [(overhead + n) / v for n, v in zip(counts, now, strict=True)]
        best = best_counts([1 / v for v in now], batch_size, [None] * len(now), [overhead / v for v in now])
        ideal = max((overhead + n) / v for n, v in zip(best, now, strict=True))
        history.efficiency.append(ideal / max(times))
        measured = [t * draw.lognormvariate(0, noise) * disturb(step, rank) for rank, t in enumerate(times)]
        if balancer.observe(measured, counts) is not None:
            history.changes.append(step)
        history.counts.append(balancer.counts)
    return history


def brute_force(each: Sequence[float], total: int, limits: Sequence[int | None], overhead: Sequence[float]) -> float:
    """The shortest possible step, by trying everything."""
    least = 1 if total >= len(each) else 0
    ranges = [range(min(least, total if m is None else m), (total if m is None else m) + 1) for m in limits]
    return min(
        max((o + n * s for n, s, o in zip(counts, each, overhead, strict=True) if n), default=0.0)
        for counts in itertools.product(*ranges)
        if sum(counts) == total
    )


@st.composite
def small_problems(draw: st.DrawFn) -> tuple[list[float], int, list[int | None], list[float]]:
    num_ranks = draw(st.integers(1, 4))
    each = draw(st.lists(st.floats(1e-3, 1e3), min_size=num_ranks, max_size=num_ranks))
    overhead = draw(st.lists(st.floats(0, 1e3), min_size=num_ranks, max_size=num_ranks))
    limits = draw(st.lists(st.none() | st.integers(1, 8), min_size=num_ranks, max_size=num_ranks))
    most = sum(8 if limit is None else limit for limit in limits)
    return each, draw(st.integers(num_ranks, min(9, max(num_ranks, most)))), limits, overhead


@settings(max_examples=200, deadline=None)
@given(small_problems())
def test_the_best_counts_are_as_good_as_any(problem: tuple[list[float], int, list[int | None], list[float]]) -> None:
    each, total, limits, overhead = problem
    counts = best_counts(each, total, limits, overhead)
    step = max(o + n * s for n, s, o in zip(counts, each, overhead, strict=True))
    assert step == pytest.approx(brute_force(each, total, limits, overhead), rel=1e-9)


@settings(deadline=None)
@given(SPEEDS, st.integers(0, 100_000), st.data())
def test_counts_sum_to_the_batch_within_their_limits_and_nobody_is_left_out(
    each: list[float], total: int, data: st.DataObject
) -> None:
    limits = data.draw(st.lists(st.none() | st.integers(1, 2 * total + 2), min_size=len(each), max_size=len(each)))
    if sum(total if limit is None else limit for limit in limits) < total:
        with pytest.raises(PlanError, match="can hold only"):
            best_counts(each, total, limits)
        return
    counts = best_counts(each, total, limits)
    assert sum(counts) == total
    assert all(limit is None or count <= limit for count, limit in zip(counts, limits, strict=True))
    assert all(count >= (total >= len(each)) for count in counts)


@pytest.mark.parametrize("scale", [1e-300, 1e-9, 1.0, 1e9, 1e300])
def test_only_proportions_of_speeds_count(scale: float) -> None:
    assert best_counts([scale, scale, 2 * scale, 4 * scale], 220, [None] * 4) == [80, 80, 40, 20]


def test_equal_ranks_get_equal_counts_and_the_first_take_the_rest() -> None:
    assert best_counts([0.1] * 4, 66, [None] * 4) == [17, 17, 16, 16]


def test_a_rank_at_its_limit_leaves_the_rest_to_the_others_by_their_speeds() -> None:
    assert best_counts([1.0, 1.0, 2.0], 60, [12, None, None]) == [12, 32, 16]


def test_a_limit_that_is_too_small_is_told_with_what_to_do() -> None:
    with pytest.raises(PlanError, match=r"can hold only 30 \(rank 0: 10, rank 1: 20\); make batch.size smaller"):
        best_counts([1.0, 1.0], 31, [10, 20])


def test_after_running_out_of_memory_a_rank_gets_at_most_three_quarters() -> None:
    assert shrunk([None, 50, None], 0, 40, total=100) == [30, 50, None]
    assert shrunk([20, None], 0, 40, total=100) == [20, None]
    assert shrunk([None, None], 1, 2, total=100) == [None, 1]


def test_a_rank_that_cannot_hold_one_sample_and_a_batch_that_fits_nowhere_are_refused() -> None:
    with pytest.raises(PlanError, match="rank 1 ran out of memory with 1 sample"):
        shrunk([None, None], 1, 1, total=8)
    with pytest.raises(PlanError, match="can hold only"):
        shrunk([None, 60], 0, 50, total=100)


def test_running_out_of_memory_again_and_again_shrinks_until_it_fits() -> None:
    balancer = Balancer(3, 96, CONFIG)
    while (count := balancer.counts[1]) > 10:
        counts = balancer.out_of_memory(1, count)
        assert counts == balancer.counts
        assert counts[1] < count
        assert sum(counts) == 96
    assert balancer.limits[1] == balancer.counts[1]
    assert abs(balancer.counts[0] - balancer.counts[2]) <= 1


def test_a_limit_holds_whatever_is_measured_later() -> None:
    balancer = Balancer(2, 64, CONFIG, limits=[20, None])
    assert balancer.counts == [20, 44]
    for _ in range(100):
        counts = balancer.counts
        balancer.observe([counts[0] / 10, counts[1]], counts)
    assert balancer.counts == [20, 44]


def test_it_begins_with_the_shares_that_are_given() -> None:
    for shares in ([1.0, 2.0, 5.0], [1.0, 1.0, 1.0], [3.0, 0.1, 9.0]):
        assert Balancer(3, 97, CONFIG, shares).counts == divide(97, shares)


def test_a_rank_with_a_share_of_nothing_gets_one_sample_so_that_its_speed_is_known() -> None:
    assert Balancer(3, 64, CONFIG, [1.0, 0.0, 1.0]).counts == [32, 1, 31]


def test_unlike_ranks_soon_train_at_nearly_their_joint_speed_with_few_changes() -> None:
    runs = [simulate(lambda step: (1, 1, 0.5, 0.25), steps=500, seed=seed, batch_size=440) for seed in range(12)]
    assert all(len(run.changes) <= 4 for run in runs)
    # From equal shares: four times the slowest rank's speed, of 2.75.
    assert all(run.efficiency[0] < 0.37 for run in runs)
    # 30 steps with noise of 15 % leave each speed uncertain by 3 %, and the slowest of four sets the pace: even the
    # mean of all measurements would come to 0.97 only.
    assert statistics.fmean(run.efficiency[30] for run in runs) > 0.95
    assert statistics.fmean(run.efficiency[100] for run in runs) > 0.97
    assert min(run.efficiency[100] for run in runs) > 0.93


def test_unlike_ranks_train_at_their_joint_speed_within_30_steps_where_noise_is_low() -> None:
    runs = [simulate(lambda step: (1, 1, 0.5, 0.25), steps=40, seed=seed, noise=0.05) for seed in range(12)]
    assert statistics.fmean(run.efficiency[30] for run in runs) > 0.97


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_noise_moves_nothing(num_ranks: int) -> None:
    for seed in range(4):
        assert not simulate(lambda step: (1,) * num_ranks, steps=1000, seed=seed).changes


@pytest.mark.parametrize("step", [1, 5, 52, 99])
@pytest.mark.parametrize("factor", [10, 1000])
def test_one_slow_step_moves_nothing(step: int, factor: float) -> None:
    for seed in range(3):
        slow = simulate(
            lambda _: (1,) * 4, steps=150, seed=seed, disturb=lambda s, rank: factor if (s, rank) == (step, 1) else 1.0
        )
        assert not slow.changes


def test_pauses_that_every_rank_takes_now_and_then_move_nothing() -> None:
    for seed in range(3):
        draw = random.Random(-seed)
        assert not simulate(
            lambda _: (1,) * 4,
            steps=600,
            seed=seed,
            noise=0.1,
            disturb=lambda _s, _r, draw=draw: 3.0 if draw.random() < 0.05 else 1.0,
        ).changes


def test_all_slowing_down_together_moves_nothing() -> None:
    for seed in range(3):
        assert not simulate(lambda step: (0.2 if step > 60 else 1,) * 4, steps=200, seed=seed).changes


def test_a_rank_that_slows_down_for_good_gives_up_samples_soon_and_gets_them_back_when_it_recovers() -> None:
    for seed in range(10):
        run = simulate(lambda step: (1, 1, 1, 1 / 3 if 100 < step <= 300 else 1), steps=400, seed=seed)
        assert not [step for step in run.changes if step <= 100]
        assert run.counts[111][3] < 40 < 64 < run.counts[111][0]
        assert run.efficiency[150] > 0.9
        assert run.counts[311][3] > 48
        assert run.efficiency[-1] > 0.9
        assert len(run.changes) <= 8


@pytest.mark.parametrize("overhead", [8, 32, 128])
def test_an_overhead_that_does_not_shrink_with_the_share_is_learned(overhead: int) -> None:
    runs = [
        simulate(lambda step: (1, 1, 0.5, 0.25), steps=200, seed=seed, noise=0.05, overhead=overhead)
        for seed in range(5)
    ]
    assert statistics.fmean(run.efficiency[-1] for run in runs) > 0.97
    assert all(len(run.changes) <= 5 for run in runs)


def test_a_smaller_last_batch_of_an_epoch_is_no_news() -> None:
    balancer = Balancer(2, 64, CONFIG)
    for step in range(400):
        counts = balancer.counts if step % 7 else [3, 2]
        # With an overhead of 16 samples, a small batch seems to take much longer a sample.
        assert balancer.observe([(n + 16) * 0.01 for n in counts], counts) is None


def test_where_samples_are_fewer_than_ranks_one_that_was_slow_is_tried_again() -> None:
    balancer, speeds = Balancer(3, 2, CONFIG), [1.0, 0.1, 1.0]
    tried = []
    for step in range(400):
        if step == 150:
            speeds = [0.1, 1.0, 1.0]
        counts = balancer.counts
        balancer.observe([n / v for n, v in zip(counts, speeds, strict=True)], counts)
        tried.append(balancer.counts)
    assert tried[140] == [1, 0, 1]
    assert tried[-1] == [0, 1, 1]
    assert sum(one != other for one, other in itertools.pairwise(tried)) <= 6


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_time_that_cannot_be_is_left_out(bad: float) -> None:
    balancer = Balancer(2, 64, CONFIG)
    for step in range(100):
        counts = balancer.counts
        balancer.observe([counts[0], bad if step % 3 == 0 else 2 * counts[1]], counts)
    assert balancer.counts == [43, 21]


def test_nothing_changes_while_a_rank_has_never_been_measured() -> None:
    balancer = Balancer(3, 64, CONFIG)
    assert all(balancer.observe([1.0, 9.0, 0.0], balancer.counts) is None for _ in range(100))


def test_one_rank_keeps_the_batch() -> None:
    balancer = Balancer(1, 64, CONFIG)
    assert all(balancer.observe([random.Random(step).random()], [64]) is None for step in range(100))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(0, 200),
    st.integers(0, 2**32),
    st.builds(BalanceConfig, every=st.integers(3, 6), patience=st.integers(1, 3), history=st.integers(4, 12)),
)
def test_counts_are_always_a_division_of_the_batch_the_same_on_every_rank(
    num_ranks: int, batch_size: int, seed: int, config: BalanceConfig
) -> None:
    draw = random.Random(seed)
    limits = [draw.choice([None, batch_size // 2 + 1]) for _ in range(num_ranks)]
    limits[0] = None
    one, other = (Balancer(num_ranks, batch_size, config, limits=limits) for _ in range(2))
    for _ in range(60):
        counts = one.counts
        seconds = [n * draw.choice([0.1, 1, 5]) * draw.lognormvariate(0, 0.3) for n in counts]
        told = one.observe(seconds, counts)
        assert told == other.observe(seconds, counts)
        assert one.counts == other.counts == (told or counts)
        assert sum(one.counts) == batch_size
        assert all(n >= (batch_size >= num_ranks) for n in one.counts)
        assert all(limit is None or n <= limit for n, limit in zip(one.counts, limits, strict=True))


def test_another_balancer_begins_with_what_is_known_of_each_rank() -> None:
    """As after a restart, or in the next view: rank 1 has gone, the last one is new."""
    one, speeds = Balancer(3, 120, CONFIG), [1.0, 4.0, 2.0]
    while one.observe([n / v for n, v in zip(one.counts, speeds, strict=True)], one.counts) is None:
        pass
    one.out_of_memory(0, one.counts[0])
    known = json.loads(json.dumps(one.known()))
    assert Balancer(3, 120, CONFIG).learn(known) == one.counts
    limit = known[0]["limit"]
    other = Balancer(2, 60, CONFIG)
    assert other.learn([known[0], known[2]]) == [limit, 60 - limit]
    assert Balancer(3, 60, CONFIG, limits=[None, None, 0]).learn([known[0], known[2], None])[2] == 0
    assert other.known() != known
    assert json.dumps(known) == json.dumps(one.known()), "what was told does not change by going on"


def test_a_rank_that_could_take_nothing_so_far_is_admitted_with_as_much_as_the_fastest() -> None:
    balancer = Balancer(3, 90, CONFIG, limits=[None, None, 0])
    assert balancer.counts == [45, 45, 0]
    assert Balancer(3, 90, CONFIG, limits=[None, None, 0]).admit([2]) == [30, 30, 30]
    for _ in range(20):
        balancer.observe([n * s for n, s in zip(balancer.counts, [1.0, 2.0, 1.0], strict=True)], balancer.counts)
    assert balancer.counts == [60, 30, 0]
    assert balancer.admit([2]) == [36, 18, 36]
    assert balancer.seconds_per_sample is None, "one with samples is not known"
