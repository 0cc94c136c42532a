"""How far a training has come: what a checkpoint must know beside tensors."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Self

from shoal.data.loader import Cursor


@dataclass(frozen=True, kw_only=True)
class Progress:
    """After so many committed steps.

    Attributes:
        step: optimizer steps done.
        cursor: where the next batch stands in the data.
        samples: samples seen, over all ranks and epochs.
        seconds: time in the training loop, over all attempts.
        loss: of the last step.
        val_loss, metrics: of the last validation; NaN and none before the first.
        validated_step: the step after which that was; -1 before the first.
        best_loss: the lowest validation loss so far; infinite before the first.
        stale: validations in a row without a new lowest loss.
    """

    step: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    samples: int = 0
    seconds: float = 0.0
    loss: float = math.nan
    val_loss: float = math.nan
    metrics: dict[str, float] = field(default_factory=dict)
    validated_step: int = -1
    best_loss: float = math.inf
    stale: int = 0

    def to_plain(self) -> dict[str, Any]:
        """As plain values, for a checkpoint."""
        return dataclasses.asdict(self)

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Self:
        """The inverse of `to_plain`."""
        return cls(**(plain | {"cursor": Cursor(**plain["cursor"])}))
