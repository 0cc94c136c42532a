"""Which rank is slow, whether it lasts, and what it is slow at.

A rank is slow in a step when it needs much longer than a usual rank would have needed for the same work: the same
samples fetched and computed, the same bytes sent, each at the lower median of all ranks' rates. So a small share does
not hide a slow rank, and a slow link that matters little to the step counts little. What it is slow at is what most of
the excess was spent on.

One slow step (a pause of the garbage collector, a cold page cache) is nobody's news. Slowness is *passing* once most of
the last few steps were slow, and *persistent* once most of a long window was. What to do about it is decided elsewhere:
shares follow speeds by themselves (`balance`).

Assumptions: where ranks have unlike overheads a step, or one is down to a few samples, its factor tells the overhead
too. A link can be blamed only if its time is the rank's own: in a collective, in which everybody moves at the pace of
the slowest, all are equally late and nobody is named.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from shoal.strict_toml import STRICT

Cause = Literal["computing", "data", "link"]
_CAUSES: tuple[Cause, ...] = ("computing", "data", "link")
_CLEARLY = 2.0
"""A cause replaces another that was told already when it costs so many times as much."""


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """When a rank is called slow.

    Attributes:
        factor: a step is slow when it takes so many times what a usual rank would need.
        passing_factor: and so many times, where only a few steps tell it: noise of a third is nothing unusual.
        share: the part of the steps that must be slow.
        recent: steps that are looked at for passing slowness.
        window: steps that are looked at for persistent slowness.
    """

    __pydantic_config__: ClassVar = STRICT
    factor: Annotated[float, Field(gt=1)] = 1.3
    passing_factor: Annotated[float, Field(gt=1)] = 2.0
    share: Annotated[float, Field(gt=0, le=1)] = 0.6
    recent: Annotated[int, Field(ge=2)] = 5
    window: Annotated[int, Field(ge=1)] = 50


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What one rank did in one step, waiting for others left out.

    Attributes:
        samples: how many it computed; 0 leaves its data and computing unjudged.
        data_s: how long it waited for its samples.
        compute_s: forward and backward.
        send_s: how long its own bytes were under way; 0 where that is not known.
        sent_bytes: how many they were.
    """

    samples: int
    data_s: float
    compute_s: float
    send_s: float = 0.0
    sent_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Slow:
    """A change in what is known of one rank.

    Attributes:
        cause: what most of the lost time was spent on.
        factor: how many times longer than usual it takes for its work, over the slow steps.
        since_step: the first slow step of this spell.
        persistent: it has lasted for most of a long window; else it may pass.
        until_step: the step at which it was found to be over; None while it lasts.
    """

    rank: int
    cause: Cause
    factor: float
    since_step: int
    persistent: bool
    until_step: int | None = None


@dataclass(frozen=True)
class _Step:
    """One rank's step: how many times what it should have taken, and the excess in seconds by cause (`_CAUSES`)."""

    number: int
    factor: float
    excess_s: tuple[float, float, float]


class Watch:
    """Looks at every step of all ranks, and tells what has changed.

    It holds no clock and no rank of its own: fed with the same timings, it tells the same on every rank.
    """

    def __init__(self, num_ranks: int, config: WatchConfig | None = None) -> None:
        self._config = config or WatchConfig()
        self._steps: list[deque[_Step]] = [deque(maxlen=self._config.window) for _ in range(num_ranks)]
        self._slow: list[Slow | None] = [None] * num_ranks

    @property
    def slow(self) -> list[Slow]:
        """The ranks that are slow now, as they were told last."""
        return [slow for slow in self._slow if slow is not None]

    def observe(self, step: int, timings: Sequence[Timing]) -> list[Slow]:
        """Take one step, and return what is news: a rank has become slow, lastingly slow, slow at another thing, or
        is no longer slow.

        Args:
            step: its number, larger than the last one's.
            timings: one a rank.
        """
        assert len(timings) == len(self._steps)
        news = []
        for rank, judged in enumerate(_judge(step, timings)):
            self._steps[rank].append(judged)
            before = self._slow[rank]
            now = self._look(rank, step)
            self._slow[rank] = now if now is None or now.until_step is None else None
            if now is not None and now is not before:
                news.append(now)
        return news

    def _look(self, rank: int, step: int) -> Slow | None:
        """What is to be said of the rank now; what was said of it last, where that is nothing new."""
        config, before, steps = self._config, self._slow[rank], self._steps[rank]
        if before is None and steps[-1].factor <= config.factor:
            return None
        slow = [s for s in steps if s.factor > config.factor]
        recent = [s for s in slow if s.number > step - config.recent]
        # Of the whole window, even while it is not yet full: a run's first steps prove nothing that lasts.
        persistent = len(slow) >= config.share * config.window
        if before is None:
            much = sum(s.factor > config.passing_factor for s in recent)
            # One slow step is not enough, even where all there are is one.
            if not persistent and much < max(2, config.share * config.recent):
                return None
            since = self._start(steps) if persistent else recent[0].number
            return self._told(rank, [s for s in slow if s.number >= since], since, persistent, None)
        # A spell ends at half the part of slow steps with which it began: noise around one bound would tell it twice.
        over = len(slow) < config.share / 2 * config.window if before.persistent else not recent
        if over:
            return dataclasses.replace(before, until_step=step)
        spell = [s for s in slow if s.number >= before.since_step]
        told = self._told(rank, spell, before.since_step, persistent or before.persistent, before.cause)
        return told if (told.persistent, told.cause) != (before.persistent, before.cause) else before

    def _start(self, steps: Sequence[_Step]) -> int:
        """The step from which on slow ones are most above the part of them that counts as slow."""
        above, best, start = 0.0, 0.0, steps[-1].number
        for s in reversed(steps):
            above += float(s.factor > self._config.factor) - self._config.share
            if above >= best:
                best, start = above, s.number
        return start

    def _told(self, rank: int, slow: Sequence[_Step], since: int, persistent: bool, known: Cause | None) -> Slow:
        excess = {cause: math.fsum(s.excess_s[i] for s in slow) for i, cause in enumerate(_CAUSES)}
        cause = max(_CAUSES, key=lambda one: excess[one])
        if known is not None and excess[cause] < _CLEARLY * excess[known]:
            cause = known
        factor = statistics.median(s.factor for s in slow)
        return Slow(rank=rank, cause=cause, factor=factor, since_step=since, persistent=persistent)


def _judge(step: int, timings: Sequence[Timing]) -> list[_Step]:
    """Hold every rank's step against what the usual rates (lower medians) make of its work."""
    computing = _usual([(t.compute_s, t.samples) for t in timings])
    data = _usual([(t.data_s, t.samples) for t in timings])
    link = _usual([(t.send_s, t.sent_bytes) for t in timings if t.send_s > 0])
    judged = []
    for t in timings:
        # Work that was not measured is taken to be as it should be.
        num_bytes = t.sent_bytes if t.send_s > 0 else 0
        parts = (
            (t.compute_s, computing * t.samples) if t.samples > 0 else (0.0, 0.0),
            (t.data_s, data * t.samples) if t.samples > 0 else (0.0, 0.0),
            (t.send_s, link * num_bytes) if num_bytes > 0 else (0.0, 0.0),
        )
        compute, fetch, send = (took - usual for took, usual in parts)
        took_s, usual_s = (sum(times) for times in zip(*parts, strict=True))
        # Where everybody else needs no time at all, any is too much.
        factor = took_s / usual_s if usual_s > 0 else math.inf if took_s > 0 else 1.0
        judged.append(_Step(step, factor, (compute, fetch, send)))
    return judged


def _usual(spent: Sequence[tuple[float, int]]) -> float:
    """The lower median of seconds a unit, over the ranks that did any; 0 where none did."""
    return statistics.median_low([s / n for s, n in spent if n > 0] or [0.0])
