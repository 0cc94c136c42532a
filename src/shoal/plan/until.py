"""A value to reach: `val_loss<=1.9`, `accuracy>=0.98`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from shoal.errors import PlanError, nearest


@dataclass(frozen=True)
class Until:
    """Stop once validation's `name` is at most (or at least) `bound`."""

    name: str
    at_most: bool
    bound: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `NAME<=NUMBER` or `NAME>=NUMBER`.

        Raises:
            PlanError: it is neither.
        """
        match = re.fullmatch(r"\s*(\w+)\s*(<=|>=)\s*([-+0-9.eE]+)\s*", text)
        try:
            name, relation, bound = match.groups() if match else ("", "", "")
            return cls(name, relation == "<=", float(bound))
        except ValueError:
            raise PlanError(
                f"stop.until: got {text!r}, expected a condition such as 'val_loss<=1.9' or 'accuracy>=0.98'"
            ) from None

    def reached(self, values: Mapping[str, float]) -> bool:
        """Whether `values`, from one validation, satisfy the condition.

        Raises:
            PlanError: validation has no such value.
        """
        if self.name not in values:
            raise PlanError(
                f"stop.until names '{self.name}'{nearest(self.name, values)}, but validation gives "
                f"{', '.join(sorted(values))}"
            )
        value = values[self.name]
        return value <= self.bound if self.at_most else value >= self.bound
