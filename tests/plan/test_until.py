"""A condition to stop is read as it is written, or refused in one sentence."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import PlanError
from shoal.plan.until import Until


@pytest.mark.parametrize(
    ("text", "until"),
    [
        ("val_loss<=1.9", Until("val_loss", True, 1.9)),
        ("accuracy>=0.98", Until("accuracy", False, 0.98)),
        ("  top5 >= 1 ", Until("top5", False, 1.0)),
        ("x<=-3e-2", Until("x", True, -0.03)),
        ("x>=+.5", Until("x", False, 0.5)),
    ],
)
def test_a_condition_is_a_name_a_side_and_a_number(text: str, until: Until) -> None:
    assert Until.parse(text) == until


@given(st.from_regex(r"[a-z_][a-z0-9_]{0,10}", fullmatch=True), st.booleans(), st.floats(-1e6, 1e6))
def test_every_condition_reads_back(name: str, at_most: bool, bound: float) -> None:
    assert Until.parse(f"{name}{'<=' if at_most else '>='}{bound!r}") == Until(name, at_most, bound)


@pytest.mark.parametrize(
    "text",
    ["", "x", "x<1.9", "x=1.9", "x==1", "x<=", "<=1.9", "x<=one", "a b<=1", "x<=1<=2", "x<=nan", "x>=1e", "x<=--1"],
)
def test_anything_else_is_refused_and_shown(text: str) -> None:
    with pytest.raises(PlanError, match=r"expected a condition such as 'val_loss<=1\.9' or 'accuracy>=0\.98'") as error:
        Until.parse(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0, math.inf, -math.inf])
def test_the_bound_itself_counts_on_both_sides(value: float) -> None:
    assert Until("x", True, 0.5).reached({"x": value}) == (value <= 0.5)
    assert Until("x", False, 0.5).reached({"x": value}) == (value >= 0.5)


def test_nan_reaches_nothing() -> None:
    assert not Until("x", True, 0.5).reached({"x": math.nan})
    assert not Until("x", False, 0.5).reached({"x": math.nan})


def test_a_name_that_is_not_measured_is_refused_with_those_that_are() -> None:
    with pytest.raises(PlanError) as error:
        Until("val_los", True, 1.0).reached({"val_loss": 1.0, "accuracy": 0.5})
    assert "'val_los' (did you mean 'val_loss'?)" in str(error.value)
    assert "validation gives accuracy, val_loss" in str(error.value)
