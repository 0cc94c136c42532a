"""Slowness is told once, with its cause, and neither noise nor one slow step is mistaken for it."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from shoal.data.slowness import Slow, Timing, Watch, WatchConfig

USUAL = Timing(samples=32, data_s=0.002, compute_s=0.1, send_s=0.03, sent_bytes=3_000_000)
SLOW = {
    "computing": Timing(samples=32, data_s=0.002, compute_s=0.4, send_s=0.03, sent_bytes=3_000_000),
    "data": Timing(samples=32, data_s=0.3, compute_s=0.1, send_s=0.03, sent_bytes=3_000_000),
    "link": Timing(samples=32, data_s=0.002, compute_s=0.1, send_s=0.4, sent_bytes=3_000_000),
}


def watch(
    timing: Callable[[int, int], Timing], *, steps: int, num_ranks: int = 4, noise: float = 0.0, seed: int = 0
) -> list[tuple[int, Slow]]:
    """Every piece of news with the step at which it came."""
    draw, watched, news = random.Random(seed), Watch(num_ranks), []
    for step in range(1, steps + 1):
        timings = []
        for rank in range(num_ranks):
            t = timing(step, rank)
            data, compute, send = (s * draw.lognormvariate(0, noise) for s in (t.data_s, t.compute_s, t.send_s))
            timings.append(
                Timing(samples=t.samples, data_s=data, compute_s=compute, send_s=send, sent_bytes=t.sent_bytes)
            )
        news += [(step, slow) for slow in watched.observe(step, timings)]
    return news


@pytest.mark.parametrize("cause", SLOW)
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_what_passes_is_told_when_it_comes_and_when_it_is_over_with_its_cause(cause: str, noise: float) -> None:
    news = watch(lambda step, rank: SLOW[cause] if rank == 2 and 60 < step <= 80 else USUAL, steps=200, noise=noise)
    (came, first), (went, last) = news
    assert 62 <= came <= 68
    assert (first.rank, first.cause, first.persistent, first.until_step) == (2, cause, False, None)
    assert 59 <= first.since_step <= 63
    assert 80 < went <= 100
    assert last.until_step == went
    assert (last.rank, last.cause, last.since_step) == (2, cause, first.since_step)


@pytest.mark.parametrize("cause", SLOW)
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_what_lasts_is_told_once_more_as_persistent_and_when_it_is_over(cause: str, noise: float) -> None:
    news = watch(lambda step, rank: SLOW[cause] if rank == 1 and 100 < step <= 300 else USUAL, steps=500, noise=noise)
    (_, passing), (lasted, persistent), (went, over) = news
    assert [slow.persistent for slow in (passing, persistent, over)] == [False, True, True]
    assert {slow.cause for _, slow in news} == {cause}
    assert {slow.rank for _, slow in news} == {1}
    assert 128 <= lasted <= 135
    assert 310 <= went <= 345
    assert persistent.factor == pytest.approx(sum_s(SLOW[cause]) / sum_s(USUAL), rel=0.3)


def sum_s(timing: Timing) -> float:
    return timing.compute_s + timing.data_s + timing.send_s


def test_a_rank_slower_by_a_half_is_too_little_to_be_told_at_once_but_is_told_when_it_lasts() -> None:
    slower = Timing(samples=32, data_s=0.002, compute_s=0.17, send_s=0.03, sent_bytes=3_000_000)
    (came, told), *more = watch(lambda step, rank: slower if rank == 0 else USUAL, steps=400, noise=0.1)
    assert 29 <= came <= 60
    assert told.persistent
    assert told.cause == "computing"
    assert told.since_step <= 10
    assert not more


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 16])
def test_noise_is_no_news(num_ranks: int) -> None:
    for seed in range(3):
        assert not watch(lambda step, rank: USUAL, steps=600, num_ranks=num_ranks, noise=0.25, seed=seed)


@pytest.mark.parametrize("cause", SLOW)
def test_one_slow_step_is_no_news_even_as_the_very_first(cause: str) -> None:
    for slow in (1, 2, 77):
        assert not watch(lambda step, rank, slow=slow: SLOW[cause] if (step, rank) == (slow, 3) else USUAL, steps=100)


def test_a_slow_rank_is_found_behind_a_small_share() -> None:
    small = Timing(samples=8, data_s=0.0005, compute_s=0.1, send_s=0.03, sent_bytes=3_000_000)
    news = watch(lambda step, rank: small if rank == 3 else USUAL, steps=60)
    assert news[-1][1].persistent
    assert (news[-1][1].rank, news[-1][1].cause) == (3, "computing")


def test_a_slow_link_that_costs_little_is_no_news() -> None:
    little = Timing(samples=32, data_s=0.002, compute_s=0.1, send_s=0.001, sent_bytes=10_000)
    slow = Timing(samples=32, data_s=0.002, compute_s=0.1, send_s=0.01, sent_bytes=10_000)
    assert not watch(lambda step, rank: slow if rank == 0 else little, steps=100)


def test_where_all_slow_down_nobody_is_slow() -> None:
    assert not watch(lambda step, rank: SLOW["data"] if step > 50 else USUAL, steps=150)


def test_of_two_ranks_the_slower_is_named() -> None:
    news = watch(lambda step, rank: SLOW["computing"] if rank == 1 else USUAL, steps=60, num_ranks=2)
    assert {slow.rank for _, slow in news} == {1}


def test_another_cause_is_news_once() -> None:
    news = watch(lambda step, rank: USUAL if rank else SLOW["data" if step < 100 else "computing"], steps=300)
    assert [slow.cause for _, slow in news] == ["data", "data", "computing"]


def test_what_was_not_measured_is_not_judged() -> None:
    blank = Timing(samples=0, data_s=0.0, compute_s=0.0)
    unsent = Timing(samples=32, data_s=0.002, compute_s=0.1)
    assert not watch(lambda step, rank: (blank, unsent, USUAL, USUAL)[rank], steps=100)


def test_a_wait_for_data_where_the_others_never_wait_is_named() -> None:
    prompt, waits = (Timing(samples=32, data_s=s, compute_s=0.1) for s in (0.0, 0.5))
    assert watch(lambda step, rank: waits if rank == 2 else prompt, steps=60)[-1][1].cause == "data"


def test_the_slow_ranks_can_be_asked_for_at_any_time() -> None:
    watched = Watch(3, WatchConfig(recent=3))
    for step in range(1, 10):
        watched.observe(step, [USUAL, SLOW["link"], USUAL])
    assert [slow.rank for slow in watched.slow] == [1]
    for step in range(10, 20):
        watched.observe(step, [USUAL, USUAL, USUAL])
    assert not watched.slow
