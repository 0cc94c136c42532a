"""Every mistake in a TOML document is told by the sentence that helps most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pydantic
import pytest

from shoal import strict_toml
from shoal.errors import PlanError


@dataclass(frozen=True, kw_only=True)
class Table:
    __pydantic_config__: ClassVar[pydantic.ConfigDict] = strict_toml.STRICT

    width: int
    names: tuple[str, ...] = ()


def build(text: str) -> Table:
    values = strict_toml.parse(text, origin="t.toml", error=PlanError)
    return strict_toml.build(Table, values, text=text, origin="t.toml", error=PlanError)


def test_an_array_may_stand_for_a_tuple_and_a_table_for_a_dataclass() -> None:
    assert build('width = 1\nnames = ["a"]') == Table(width=1, names=("a",))


def test_a_misspelt_required_key_is_told_as_misspelt_and_not_as_missing() -> None:
    with pytest.raises(PlanError, match=r"t\.toml:2: unknown key 'widht' \(did you mean 'width'\?\)"):
        build('names = ["a"]\nwidht = 1')


def test_a_number_is_not_text() -> None:
    with pytest.raises(PlanError, match=r"t\.toml:1: width: got the string '1', expected"):
        build('width = "1"')
