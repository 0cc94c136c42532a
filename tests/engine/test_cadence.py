"""Checkpoints as often as their cost and the failures so far suggest, on all ranks after the same step."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from shoal.engine.checkpoint.cadence import FIRST_STEPS, Cadence
from shoal.engine.checkpoint.interval import IntervalConfig, interval_s
from training_runs import events_of, newest_checkpoint, train_on

TARGET = str(Path(__file__).parents[1] / "jobs" / "reference.py") + ":job"
CONFIG = IntervalConfig(failures=1.0, node_hours=1.0)
Told = list[tuple[int, float, float]]


class Disk:
    """Writes a checkpoint in a given number of steps' time."""

    def __init__(self, write_s: float, stall_s: float) -> None:
        self.write_s, self.stall_s = write_s, stall_s
        self.left_s = 0.0
        self.done = False

    @property
    def is_writing(self) -> bool:
        return self.left_s > 0

    def take_cost(self) -> tuple[float, float] | None:
        done, self.done = self.done, False
        return (self.stall_s, self.write_s) if done else None


def train(
    cadence: Cadence, disk: Disk, steps: int, *, first: int = 1, step_s: float = 1.0, slowdown: float = 0.0
) -> list[int]:
    """Take steps on a clock of our own; return those after which a checkpoint was begun."""
    saved = []
    for step in range(first, first + steps):
        seconds = step_s / (1 - slowdown) if disk.is_writing else step_s
        if cadence.is_due(step):
            saved.append(step)
        cadence.stepped(seconds, disk)
        if disk.is_writing:
            disk.left_s -= seconds
            disk.done = not disk.is_writing
        if cadence.is_due(step):
            cadence.begun(step)
            disk.left_s = disk.write_s
    return saved


def told_to(told: Told) -> Cadence:
    return Cadence(2, 0, config=CONFIG, tell=lambda *, steps, cost_s, mtbf_s: told.append((steps, cost_s, mtbf_s)))


def test_the_first_comes_early_and_the_others_at_dalys_interval() -> None:
    told: Told = []
    saved = train(told_to(told), Disk(write_s=3.0, stall_s=2.0), 400)
    assert saved[0] == FIRST_STEPS
    steps, cost_s, mtbf_s = told[0]
    assert cost_s == 2.0
    assert mtbf_s == pytest.approx(1800, rel=0.01)
    assert steps == pytest.approx(interval_s(2.0, mtbf_s), abs=1)
    assert {after - before for before, after in itertools.pairwise(saved)} <= {steps for steps, _, _ in told}


def test_a_new_interval_is_told_when_it_changes_and_failures_make_it_shorter() -> None:
    told: Told = []
    cadence = told_to(told)
    train(cadence, Disk(write_s=3.0, stall_s=2.0), 100)
    before = len(told)
    cadence.lost(0)
    assert len(told) == before
    cadence.lost(2)
    assert told[-1][0] < told[before - 1][0]
    assert told[-1][2] == pytest.approx(told[before - 1][2] / 2, rel=0.05), "two at once are one failure"


def test_training_that_is_slower_while_a_checkpoint_is_written_is_part_of_its_cost() -> None:
    told: Told = []
    train(told_to(told), Disk(write_s=8.0, stall_s=0.0), 60, slowdown=0.25)
    assert told[0][1] == pytest.approx(0.25 * 8.0)


def test_until_a_checkpoint_is_on_disk_they_stay_far_enough_apart() -> None:
    cadence = Cadence(1, 0, config=CONFIG)
    disk = Disk(write_s=1e9, stall_s=1.0)
    assert train(cadence, disk, 35) == [FIRST_STEPS, 2 * FIRST_STEPS, 3 * FIRST_STEPS]


def test_it_goes_on_where_another_stood() -> None:
    told: Told = []
    one = told_to(told)
    train(one, Disk(write_s=3.0, stall_s=2.0), 100)
    other = Cadence(2, 77)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert [step for step in range(100, 300) if one.is_due(step)] == [s for s in range(100, 300) if other.is_due(s)]
    assert other.state_dict() == one.state_dict()


def test_a_run_saves_by_itself_and_every_rank_after_the_same_step(tmp_path: Path) -> None:
    plan = """
        [batch]
        size = 12
        [compute]
        device = "cpu"
        [validation]
        every = 0
        [checkpoint]
        every = "auto"
        keep = 9
        [stop]
        steps = 60
    """
    run = train_on(["a", "b"], TARGET, plan, tmp_path / "run", settings=["nap_s=0.05"])
    saved = [event["step"] for event in events_of(run, "checkpoint_saved")]
    assert saved[0] == FIRST_STEPS
    assert saved[-1] == 60
    assert newest_checkpoint(run).name == "step-00000060"
    told = events_of(run, "interval")
    assert told
    assert told[0]["steps"] >= 1
    # Failures are assumed to be rare, and the model is small: seconds at least, or hundreds of steps.
    assert told[0]["steps"] * 0.05 == pytest.approx(interval_s(told[0]["cost_s"], told[0]["mtbf_s"]), rel=0.6)
    assert not events_of(run, "interval", "rank-1")
    assert not events_of(run, "checkpoint_failed")
