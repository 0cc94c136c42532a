"""When training ends. Pure decisions on plain values.

Limits that every rank counts alike (steps, epochs, validation) are decided by each for itself. Time and a person's wish
are one rank's knowledge: they are put to the vote of the next step.
"""

from __future__ import annotations

from collections.abc import Mapping

from shoal.engine.progress import Progress
from shoal.plan.schema import StopConfig
from shoal.plan.until import Until


class StopRule:
    """Applies `[stop]`."""

    def __init__(self, config: StopConfig) -> None:
        self._config = config
        self._until = Until.parse(config.until) if config.until else None

    def before_step(self, progress: Progress) -> str | None:
        """The limit that forbids another step, if any: "steps" or "epochs"."""
        if self._config.steps is not None and progress.step >= self._config.steps:
            return "steps"
        if self._config.epochs is not None and progress.cursor.epoch >= self._config.epochs:
            return "epochs"
        return None

    def out_of_time(self, seconds: float) -> bool:
        """Whether training has taken its time."""
        return self._config.seconds is not None and seconds >= self._config.seconds

    def after_validation(self, values: Mapping[str, float], progress: Progress) -> str | None:
        """The validation limit that is met, if any: "until" or "patience"."""
        if self._until is not None and self._until.reached(values):
            return "until"
        if self._config.patience and progress.stale >= self._config.patience:
            return "patience"
        return None
