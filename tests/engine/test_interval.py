"""The interval between checkpoints is Daly's, from what was measured, and stays within bounds."""

from __future__ import annotations

import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.engine.checkpoint.interval import Interval, IntervalConfig, interval_s

MINUTE, HOUR = 60.0, 3600.0


@pytest.mark.parametrize(("mtbf_s", "minutes"), [(24 * HOUR, 117), (6 * HOUR, 57), (15 * MINUTE, 9.1)])
def test_it_is_what_the_paper_tells_in_its_figures_3_to_5(mtbf_s: float, minutes: float) -> None:
    assert interval_s(5 * MINUTE, mtbf_s) / MINUTE == pytest.approx(minutes, abs=0.5 if minutes > 10 else 0.05)


@given(st.floats(0.001, 1e3), st.floats(0.01, 1e8))
def test_it_is_positive_and_never_above_the_time_between_failures(cost_s: float, mtbf_s: float) -> None:
    assert 0 < interval_s(cost_s, mtbf_s) <= mtbf_s * 1.0001


def test_it_is_youngs_where_a_checkpoint_costs_next_to_nothing() -> None:
    assert interval_s(0.01, 1e6) == pytest.approx(math.sqrt(2 * 0.01 * 1e6), rel=1e-3)
    assert interval_s(0.0, 1e6) == 0.0


@pytest.mark.parametrize(("cost_s", "mtbf_s"), [(30.0, 3600.0), (60.0, 600.0), (5.0, 86400.0)])
def test_no_other_interval_wastes_less(cost_s: float, mtbf_s: float) -> None:
    def waste(seconds: float) -> float:
        # Daly's complete model: expected time for each second of training, up to a factor that the interval leaves.
        return math.expm1((seconds + cost_s) / mtbf_s) / seconds

    best = min((waste(s), s) for s in [mtbf_s * k / 10_000 for k in range(1, 20_000)])[1]
    assert interval_s(cost_s, mtbf_s) == pytest.approx(best, rel=0.01)
    assert waste(interval_s(cost_s, mtbf_s)) == pytest.approx(waste(best), rel=1e-4)


def test_nothing_is_said_before_a_step_and_a_checkpoint_are_measured() -> None:
    interval = Interval()
    assert interval.steps is None
    interval.trained(10.0, 100, num_nodes=4)
    assert interval.steps is None
    interval.saved(0.5)
    assert interval.steps is not None


def test_until_more_is_known_a_node_fails_once_a_day() -> None:
    interval = Interval()
    interval.trained(1.0, 10, num_nodes=4)
    assert interval.mtbf_s == pytest.approx(6 * HOUR, rel=1e-3)


def test_failures_that_were_seen_take_the_place_of_what_was_assumed() -> None:
    interval = Interval()
    for _ in range(100):
        interval.trained(HOUR, 3600, num_nodes=8)
        interval.failed()
    assert interval.mtbf_s == pytest.approx(HOUR, rel=0.05)
    calm = Interval()
    calm.trained(1000 * HOUR, 3_600_000, num_nodes=8)
    assert calm.mtbf_s > 900 * HOUR


def test_several_nodes_lost_at_once_are_one_failure_and_none_is_none() -> None:
    one, rack, none = Interval(), Interval(), Interval()
    one.failed()
    rack.failed(nodes=4)
    none.failed(nodes=0)
    assert one.mtbf_s == rack.mtbf_s < none.mtbf_s


def test_more_failures_dearer_steps_and_cheaper_checkpoints_mean_fewer_steps_between() -> None:
    def steps(*, step_s: float = 0.1, cost_s: float = 1.0, failures: int = 0, nodes: int = 4) -> int:
        interval = Interval()
        interval.trained(100 * step_s, 100, num_nodes=nodes)
        interval.saved(cost_s)
        for _ in range(failures):
            interval.failed()
        assert interval.steps is not None
        return interval.steps

    assert steps() == pytest.approx(interval_s(1.0, 6 * HOUR) / 0.1, abs=2)
    assert steps(failures=5) < steps() < steps(cost_s=4.0)
    assert steps(step_s=0.2) < steps()
    assert steps(nodes=64) < steps()


def test_writing_in_the_background_costs_what_it_slows_down() -> None:
    interval = Interval()
    interval.saved(0.2, background_s=10.0, slowdown=0.1)
    assert interval.cost_s == pytest.approx(1.2)


def test_a_checkpoint_does_not_begin_before_the_last_one_is_written() -> None:
    interval = Interval()
    interval.trained(10.0, 10, num_nodes=1)
    interval.saved(0.0, background_s=50.0)
    assert interval.steps == 50


def test_one_unusual_checkpoint_or_step_changes_little() -> None:
    interval = Interval()
    for k in range(9):
        interval.trained(100.0 if k == 4 else 1.0, 10, num_nodes=1)
        interval.saved(600.0 if k == 5 else 1.0)
    assert interval.cost_s == 1.0
    assert interval.steps == pytest.approx(interval_s(1.0, interval.mtbf_s) / 0.1, abs=1)


@given(st.floats(0, 1e5), st.floats(0, 1e5), st.integers(1, 10_000), st.integers(1, 50), st.integers(0, 1000))
def test_it_stays_within_its_bounds(cost_s: float, seconds: float, nodes: int, low: int, more: int) -> None:
    interval = Interval(IntervalConfig(min_steps=low, max_steps=low + more))
    interval.trained(seconds, 7, num_nodes=nodes)
    interval.saved(cost_s)
    assert interval.steps is not None
    assert low <= interval.steps <= low + more


def test_what_it_knows_outlives_a_restart() -> None:
    draw, interval = random.Random(1), Interval()
    for _ in range(20):
        interval.trained(draw.random(), 3, num_nodes=4)
        interval.saved(draw.random(), draw.random(), draw.random())
    interval.failed()
    again = Interval()
    again.load_state_dict(json.loads(json.dumps(interval.state_dict())))
    assert again.steps == interval.steps
    assert again.state_dict() == interval.state_dict()
