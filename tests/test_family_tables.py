"""Each row of a family's table is whole: a class, its config in the plan, a test that uses it, a line of the docs."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path
from typing import Any

import pytest

from shoal.plan import Plan, parse_plan
from shoal.strategy.codec import CODECS
from shoal.strategy.sync import SYNCS

ROOT = Path(__file__).parents[1]
FAMILIES: dict[str, dict[str, Any]] = {"codec": CODECS, "sync": SYNCS}
ROWS = [(family, name) for family, table in FAMILIES.items() for name in table]


def configs(family: str) -> dict[str, Any]:
    """Kind -> config class, from the plan's own schema."""
    found = dataclass_arguments(typing.get_type_hints(Plan, include_extras=True)[family])
    return {next(f.default for f in dataclasses.fields(c) if f.name == "kind"): c for c in found}


def dataclass_arguments(hint: Any) -> list[Any]:
    if dataclasses.is_dataclass(hint):
        return [hint]
    return [inner for argument in typing.get_args(hint) for inner in dataclass_arguments(argument)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_table_and_the_plan_name_the_same_rows(family: str) -> None:
    assert configs(family).keys() == FAMILIES[family].keys()


@pytest.mark.parametrize(("family", "name"), ROWS)
def test_a_row_has_a_class_and_a_config_beside_it(family: str, name: str) -> None:
    row, config = FAMILIES[family][name], configs(family)[name]
    assert isinstance(row, type)
    assert row.__module__ == config.__module__
    assert row.__doc__
    assert config.__doc__
    assert config.__dataclass_params__.frozen
    assert config().kind == name


@pytest.mark.parametrize(("family", "name"), ROWS)
def test_a_plan_chooses_a_row_by_its_name(family: str, name: str) -> None:
    plan = parse_plan(f'[{family}]\nkind = "{name}"\n', origin="the test's plan")
    assert getattr(plan, family) == configs(family)[name]()


@pytest.mark.parametrize(("family", "name"), ROWS)
def test_a_row_is_used_by_a_test_of_its_family(family: str, name: str) -> None:
    class_name = FAMILIES[family][name].__name__
    others = [path for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)]
    users = [path.name for path in others if re.search(rf"\b{class_name}\b", path.read_text(encoding="utf-8"))]
    assert users, f"no test names {class_name}"


@pytest.mark.parametrize(("family", "name"), ROWS)
def test_a_row_is_documented(family: str, name: str) -> None:
    page = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    assert re.search(rf'["`]{name}["`]', page), f'docs/plan.md does not name {family} "{name}"'
