"""Training ends at the first limit that is met."""

from __future__ import annotations

import pytest

from shoal.data.loader import Cursor
from shoal.engine.progress import Progress
from shoal.engine.stopping import StopRule
from shoal.errors import PlanError
from shoal.plan.schema import StopConfig


def test_without_a_limit_it_goes_on() -> None:
    rule = StopRule(StopConfig())
    assert rule.before_step(Progress(step=10**9, cursor=Cursor(10**6, 0))) is None
    assert not rule.out_of_time(1e9)
    assert rule.after_validation({"val_loss": 0.0}, Progress(stale=99)) is None


@pytest.mark.parametrize(("step", "reason"), [(0, None), (9, None), (10, "steps"), (11, "steps")])
def test_steps_are_those_of_the_whole_run(step: int, reason: str | None) -> None:
    assert StopRule(StopConfig(steps=10)).before_step(Progress(step=step)) == reason


def test_zero_steps_train_nothing() -> None:
    assert StopRule(StopConfig(steps=0)).before_step(Progress()) == "steps"


def test_epochs_are_whole() -> None:
    rule = StopRule(StopConfig(epochs=2))
    assert rule.before_step(Progress(cursor=Cursor(1, 99))) is None
    assert rule.before_step(Progress(cursor=Cursor(2, 0))) == "epochs"


def test_time_is_up_when_it_is() -> None:
    rule = StopRule(StopConfig(seconds=1.5))
    assert not rule.out_of_time(1.49)
    assert rule.out_of_time(1.5)


def test_a_validation_value_may_be_reached_from_either_side() -> None:
    below, above = StopRule(StopConfig(until="val_loss<=1.9")), StopRule(StopConfig(until="accuracy >= 0.98"))
    assert below.after_validation({"val_loss": 1.91}, Progress()) is None
    assert below.after_validation({"val_loss": 1.9}, Progress()) == "until"
    assert above.after_validation({"val_loss": 0.0, "accuracy": 0.979}, Progress()) is None
    assert above.after_validation({"val_loss": 9.0, "accuracy": 0.98}, Progress()) == "until"


def test_a_value_that_validation_does_not_give_is_named() -> None:
    with pytest.raises(PlanError, match=r"names 'acuracy'.*did you mean 'accuracy'"):
        StopRule(StopConfig(until="acuracy>=0.9")).after_validation({"val_loss": 1.0, "accuracy": 0.5}, Progress())


def test_patience_counts_validations_without_a_new_best() -> None:
    rule = StopRule(StopConfig(patience=3))
    assert rule.after_validation({"val_loss": 1.0}, Progress(stale=2)) is None
    assert rule.after_validation({"val_loss": 1.0}, Progress(stale=3)) == "patience"


def test_a_value_that_is_not_a_number_reaches_nothing() -> None:
    rule = StopRule(StopConfig(until="val_loss<=1.9"))
    assert rule.after_validation({"val_loss": float("nan")}, Progress()) is None
