"""How fast one rank is, as far as its measured steps tell.

A rank needs `seconds_per_sample * (samples + overhead)` for a step, where `overhead` is what each step costs whatever
its size, counted in samples, so that a rank that slows down keeps it. It is learned only where shares have changed, and
taken as small as the measurements allow: too little of it makes a change too timid, and the next one completes it.

Steps are taken together in windows, of which the median counts: one slow step moves nothing. Windows are remembered
until the rank's speed changes for several of them, so that the estimate grows better while all is quiet.

Only additions, multiplications, divisions, square roots and comparisons are used, whose results IEEE 754 fixes to the
last bit (logarithms differ between C libraries): unlike machines that are fed the same numbers find the same speeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

CONFIDENCE = 3.0
"""Standard errors by which a difference must exceed what noise explains."""
OF_MEDIAN = 1.25
"""How much larger the standard error of a median is than that of a mean."""
_OF_MIDDLE = 1.1
"""The same for a trimmed mean."""
_OVERHEADS = (0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""Overheads that are tried, as parts of an equal share."""


@dataclass(frozen=True)
class Window:
    """Some steps of one rank, all with as many samples: their time, and how far one step scatters relative to it."""

    seconds: float
    samples: int
    spread: float


@dataclass(frozen=True)
class Estimate:
    """How fast a rank is, with the relative standard error; `overhead` in samples, from so many `windows`."""

    seconds_per_sample: float
    overhead: float
    error: float
    windows: int

    def step_s(self, samples: int) -> float:
        """Seconds for so many samples."""
        return self.seconds_per_sample * (samples + self.overhead) if samples else 0.0


class Speed:
    """One rank's windows since its speed last changed."""

    def __init__(self) -> None:
        self.windows: list[Window] = []
        self.overhead = 0.0
        self.missed = 0

    def add(self, window: Window | None, history: int) -> None:
        """Remember a window; after many without any, what is known is out of date, and forgotten."""
        self.missed = 0 if window is not None else self.missed + 1
        if window is not None:
            self.windows = [*self.windows, window][-history:]
        elif self.missed >= history:
            self.windows = []

    def learn_overhead(self, equal_share: float, noise: float) -> None:
        """Take the least overhead with which windows of different shares tell the same speed."""
        sizes = [window.samples for window in self.windows]
        if sum(sizes.count(size) >= 2 for size in set(sizes)) < 2:
            return
        tried = [part * equal_share for part in _OVERHEADS]
        misfits = [self._misfit(overhead, noise) for overhead in tried]
        # A likelihood-ratio test: one standard error.
        enough = min(misfits) + noise**2
        self.overhead = next(o for o, misfit in zip(tried, misfits, strict=True) if misfit <= enough)

    def forget_before_change(self, patience: int, gain: float, noise: float) -> None:
        """Drop the windows before a lasting change of speed: by `gain` at least, in `patience` of the last windows."""
        levels = self._levels(self.overhead)
        recent, base = levels[-patience - 1 :], levels[: -patience - 1]
        if not base:
            return
        usual, scatter = _middle(base), max(noise, _spread(base) if len(base) > 1 else 0.0)
        least = 1 + max(CONFIDENCE * scatter, gain)
        for deviates in ([x > usual * least for x in recent], [x * least < usual for x in recent]):
            if sum(deviates) >= patience:
                self.windows = self.windows[len(base) + deviates.index(True) :]
                return

    def estimate(self, noise: float) -> Estimate:
        """The speed that the windows tell together."""
        levels = self._levels(self.overhead)
        scatter = max(noise, _spread(levels) if len(levels) > 1 else 0.0)
        error = scatter * _OF_MIDDLE / math.sqrt(len(levels))
        return Estimate(_middle(levels), self.overhead, error, len(levels))

    def _levels(self, overhead: float) -> list[float]:
        return [window.seconds / (window.samples + overhead) for window in self.windows]

    def _misfit(self, overhead: float, noise: float) -> float:
        levels = self._levels(overhead)
        center = _middle(levels)
        return math.fsum(min((level / center - 1) ** 2, (CONFIDENCE * noise) ** 2) for level in levels)

    def state_dict(self) -> dict[str, Any]:
        """All of it, as plain JSON."""
        windows = [[w.seconds, w.samples, w.spread] for w in self.windows]
        return {"overhead": self.overhead, "missed": self.missed, "windows": windows}

    @classmethod
    def of(cls, state: dict[str, Any]) -> Self:
        """The inverse of `state_dict`."""
        speed = cls()
        speed.overhead, speed.missed = state["overhead"], state["missed"]
        speed.windows = [Window(*window) for window in state["windows"]]
        return speed


def window_of(steps: Sequence[tuple[float, int]]) -> Window | None:
    """One rank's steps together; None unless most of them were measured, with the same number of samples."""
    measured = [(s, n) for s, n in steps if n > 0 and 0 < s < math.inf]
    if not measured:
        return None
    # The last batch of an epoch may be smaller: it tells another story.
    samples = statistics.median_low([n for _, n in measured])
    alike = [s for s, n in measured if n == samples]
    if 2 * len(alike) <= len(steps):
        return None
    return Window(statistics.median(alike), samples, _spread(alike))


def _middle(values: Sequence[float]) -> float:
    """The mean of what is left when a quarter is dropped at either end."""
    drop = len(values) // 4
    return statistics.fmean(sorted(values)[drop : len(values) - drop])


def _spread(values: Sequence[float]) -> float:
    """The distance between the quartiles (the range, of fewer than 5) relative to the middle: about 1 to 2 sigma."""
    ordered = sorted(values)
    drop = (len(values) - 1) // 4
    return (ordered[len(values) - 1 - drop] - ordered[drop]) / _middle(values)
