"""Who takes how many samples is decided from what was measured in the step that it was measured in."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from shoal.data.balance import BalanceConfig
from shoal.data.partition import divide
from shoal.engine.division import Division, Measured
from shoal.engine.exchange.agreement import Verdict
from shoal.errors import PlanError

BALANCE = BalanceConfig()


def verdict(seconds: Sequence[float], *, cold: bool = False) -> Verdict:
    return Verdict(1.0, [], stop=False, cold=cold, data_s=[0.0] * len(seconds), compute_s=list(seconds))


class Cluster:
    """Ranks of given speeds; what they tell is of the step before, and in the first steps it is wrong."""

    def __init__(self, division: Division, speeds: Sequence[float], batch_size: int = 60) -> None:
        self.division = division
        self.speeds = speeds
        self.batch_size = batch_size
        self.told = [0.0] * len(speeds)
        self.since_change = 0
        self.changes: list[list[int]] = []

    def step(self, size: int | None = None, *, cold: bool = False) -> Measured | None:
        size = size or self.batch_size
        counts = divide(size, self.division.shares)
        given = verdict(self.told, cold=cold)
        slow_start = 50 if self.since_change < 2 else 1
        self.told = [slow_start * n / v for n, v in zip(counts, self.speeds, strict=True)]
        self.since_change += 1
        measured = self.division.committed(size, given)
        if self.division.follow(measured, cold=cold):
            self.changes.append(self.division.counts)
            self.since_change = 0
        return measured


def test_seconds_are_laid_beside_the_samples_of_the_step_that_they_were_measured_in() -> None:
    cluster = Cluster(Division([1.0, 2.0], 60), [10.0, 10.0])
    told = [cluster.step(size) for size in (60, 60, 60, 9, 60, 60)]
    assert told[:3] == [None] * 3, "nothing is known before a step has counted, nor of those that settle"
    assert [one.samples if one else () for one in told[3:]] == [(20, 40), (3, 6), (20, 40)]
    for one in told[3:]:
        assert one is not None
        assert one.seconds == pytest.approx([n / 10 for n in one.samples])


def test_without_balance_shares_stay() -> None:
    cluster = Cluster(Division([1.0, 2.0], 60), [10.0, 1.0])
    for _ in range(60):
        cluster.step()
    assert not cluster.changes
    assert cluster.division.shares == (1.0, 2.0)
    assert cluster.division.known == {}


def test_with_balance_they_follow_speeds_in_whole_samples() -> None:
    cluster = Cluster(Division([1.0, 1.0, 1.0], 60, balance=BALANCE), [1.0, 4.0, 1.0])
    for step in range(100):
        cluster.step(60 if step % 5 else 7)
    assert cluster.division.counts == [10, 40, 10]
    assert cluster.division.shares == (10.0, 40.0, 10.0)
    assert len(cluster.changes) <= 2
    assert cluster.division.seconds_per_sample == pytest.approx([1.0, 0.25, 1.0])


def test_newcomers_get_nothing_until_all_of_them_have_their_state() -> None:
    cluster = Cluster(Division([1.0] * 3, 60, cold=[1]), [1.0] * 3)
    cluster.step(cold=True)
    assert cluster.division.counts == [30, 0, 30]
    cluster.step(cold=True)
    cluster.step(cold=False)
    assert cluster.changes == [[20, 20, 20]]
    cluster.step(cold=False)
    assert cluster.changes == [[20, 20, 20]]


def test_under_balance_a_newcomer_begins_as_fast_as_the_fastest_and_then_gets_what_it_can_do() -> None:
    cluster = Cluster(Division([1.0] * 3, 60, cold=[2], balance=BALANCE), [3.0, 1.0, 1.0])
    for _ in range(60):
        cluster.step(cold=True)
    assert cluster.division.counts == [45, 15, 0]
    cluster.step(cold=False)
    assert cluster.division.counts == [26, 8, 26]
    for _ in range(60):
        cluster.step()
    assert cluster.division.counts == [36, 12, 12]


def test_what_is_known_follows_a_seat_into_the_next_view() -> None:
    cluster = Cluster(Division([1.0] * 3, 60, balance=BALANCE, seats=[0, 4, 7]), [3.0, 2.0, 1.0])
    for _ in range(60):
        cluster.step()
    known = json.loads(json.dumps(cluster.division.known))
    assert Division([1.0] * 2, 60, balance=BALANCE, seats=[4, 7], known=known).counts == [40, 20]
    newcomer = Division([1.0] * 3, 60, balance=BALANCE, seats=[0, 4, 7], cold=[0], known=known)
    assert newcomer.counts == [0, 40, 20], "a seat's new holder is a stranger"
    assert set(newcomer.known) == {"4", "7"}


def test_out_of_memory_a_rank_gets_less_and_so_does_each_of_several() -> None:
    division = Division([1.0] * 3, 60, balance=BALANCE)
    division.dropped(60, [1, 2])
    assert division.counts == [30, 15, 15]
    division.dropped(60, [2])
    assert division.counts[2] == 11
    assert sum(division.counts) == 60
    with pytest.raises(PlanError, match="can hold only"):
        Division([1.0] * 2, 60, balance=BALANCE).dropped(60, [0, 1])


def test_what_was_measured_in_a_step_that_was_dropped_is_not_used() -> None:
    division = Division([1.0] * 2, 60, balance=BALANCE)
    for _ in range(4):
        division.committed(60, verdict([1.0, 1.0]))
    division.dropped(60, [0])
    assert division.committed(60, verdict([9.0, 9.0])) is None
