"""Each rank's share of the global batch follows its measured speed, while training runs.

Every rank feeds the same measurements of all ranks, so all come to the same shares with no further message. That holds
on unlike machines too: only additions, multiplications, divisions, square roots and comparisons are used, whose results
IEEE 754 fixes to the last bit (logarithms differ between C libraries).

A rank needs `seconds_per_sample * (samples + overhead)` for a step, where `overhead` is what each step costs whatever
its size, counted in samples, so that a rank that slows down keeps it. It is learned only where shares have changed, and
taken as small as the measurements allow: too little of it makes a change too timid, and the next one completes it.

Steps are taken together in windows, of which the median counts: one slow step moves nothing. Windows are remembered
until the rank's speed changes for several of them, so that the estimate grows better while all is quiet. Shares change
when the step would become shorter even if the slowest rank were as fast as its measurements could mean. Shares that
were made from few windows are looked at again, without that caution, when there are three times as many.

How a batch is divided by given weights is told in `partition`; who is slow, and why, in `slowness`.
"""

from __future__ import annotations

import heapq
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field

from shoal.data.partition import divide
from shoal.errors import CheckpointError, PlanError
from shoal.strict_toml import STRICT

_CONFIDENCE = 3.0
"""Standard errors by which a difference must exceed what noise explains."""
_MORE_EVIDENCE = 3
"""Shares are looked at again when there are so many times the windows that they rest on."""
_OVERHEADS = (0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""Overheads that are tried, as parts of an equal share."""
_OF_MEDIAN, _OF_MIDDLE = 1.25, 1.1
"""How much larger the standard errors of a median and of a trimmed mean are than that of a mean."""


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """When shares follow speeds.

    Attributes:
        every: steps of a window; shares may change at its end.
        gain: the part of the step's time that a change must save.
        patience: windows that must agree before a rank counts as slower, or faster, than it was; one of the last
            `patience + 1` may disagree.
        history: windows that are remembered at most.
    """

    __pydantic_config__: ClassVar = STRICT
    every: Annotated[int, Field(ge=3, le=1000)] = 5
    gain: Annotated[float, Field(gt=0, lt=1)] = 0.05
    patience: Annotated[int, Field(ge=1, le=10)] = 2
    history: Annotated[int, Field(ge=4, le=1000)] = 20


def best_counts(
    seconds_per_sample: Sequence[float],
    total: int,
    limits: Sequence[int | None],
    overhead: Sequence[float] | None = None,
) -> list[int]:
    """Divide `total` samples so that the slowest rank, at `overhead + samples * seconds_per_sample`, is done first.

    The result is exact, over whole numbers; ties go to the first rank.

    Args:
        seconds_per_sample: of each rank, above 0.
        total: samples of the global batch.
        limits: the most samples that each rank can hold; None is no limit.
        overhead: seconds that each rank needs whatever its share; default: none.

    Returns:
        One count a rank, within its limit, and at least 1 where there are enough samples and the limit is not 0.

    Raises:
        PlanError: the limits together hold less than the batch.
    """
    fixed = list(overhead) if overhead is not None else [0.0] * len(seconds_per_sample)
    most = [total if limit is None else min(limit, total) for limit in limits]
    if sum(most) < total:
        raise PlanError(
            f"the batch has {total} samples, but the ranks together can hold only {sum(most)} ({_told(limits)}); "
            "make batch.size smaller, raise batch.accumulate, or add ranks"
        )
    least = [min(1, limit) if total >= len(most) else 0 for limit in most]
    ranks = list(zip(seconds_per_sample, fixed, least, most, strict=True))
    counts = _below(ranks, total)
    # What is left is less than one sample a rank, or is tied: give each to the rank that is done first with it.
    heap = [(o + (n + 1) * s, i) for i, ((s, o, _, high), n) in enumerate(zip(ranks, counts, strict=True)) if n < high]
    heapq.heapify(heap)
    for _ in range(total - sum(counts)):
        _, index = heapq.heappop(heap)
        counts[index] += 1
        each, base, _, high = ranks[index]
        if counts[index] < high:
            heapq.heappush(heap, (base + (counts[index] + 1) * each, index))
    return counts


def _below(ranks: Sequence[tuple[float, float, int, int]], total: int) -> list[int]:
    """What each rank can do in a time that does not suffice for `total`, but nearly."""

    def done(deadline: float) -> list[int]:
        return [int(min(max((deadline - o) / s, least), most)) for s, o, least, most in ranks]

    low, high = 0.0, max(o + most * s for s, o, _, most in ranks)
    while sum(counts := done(low)) < total - len(ranks):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if sum(done(middle)) <= total else (low, middle)
    return counts


def shrunk(limits: Sequence[int | None], rank: int, failed_count: int, *, total: int) -> list[int | None]:
    """The limits after `rank` ran out of memory with `failed_count` samples: it gets three quarters of that at most.

    Raises:
        PlanError: it failed with a single sample, or the ranks together can no longer hold a batch of `total`.
    """
    if failed_count <= 1:
        raise PlanError(
            f"rank {rank} ran out of memory with {failed_count} sample(s), so no share is small enough for it; "
            "use a smaller model or a layout that divides it, or leave this rank out"
        )
    smaller = list(limits)
    before = smaller[rank]
    limit = max(1, failed_count * 3 // 4)
    smaller[rank] = limit if before is None else min(before, limit)
    best_counts([1.0] * len(smaller), total, smaller)
    return smaller


class Balancer:
    """Shares of one global batch that follow what is observed.

    Args:
        num_ranks: how many ranks (under a layout: those that feed samples) divide the batch.
        batch_size: samples of the global batch.
        shares: a weight for each rank to begin with; default: equal.
        limits: the most samples that each rank can hold; None, alone or for a rank, is no limit.

    Raises:
        PlanError: the limits together hold less than the batch.
    """

    def __init__(
        self,
        num_ranks: int,
        batch_size: int,
        config: BalanceConfig,
        shares: Sequence[float] | None = None,
        limits: Sequence[int | None] | None = None,
    ) -> None:
        self._config = config
        self._batch_size = batch_size
        self._limits = list(limits) if limits is not None else [None] * num_ranks
        self._counts = _initial(shares if shares is not None else [1.0] * num_ranks, batch_size, self._limits)
        self._speeds = [_Speed() for _ in range(num_ranks)]
        self._steps: list[list[tuple[float, int]]] = []
        # How many windows the shares rest on; None where they were given, and where they have been confirmed.
        self._rest_on: int | None = None

    @property
    def counts(self) -> list[int]:
        """Samples of a whole global batch for each rank."""
        return list(self._counts)

    @property
    def limits(self) -> list[int | None]:
        """The most samples that each rank can hold."""
        return list(self._limits)

    def observe(self, seconds: Sequence[float], samples: Sequence[int]) -> list[int] | None:
        """Take one step's measurements, the same on every rank.

        Args:
            seconds: what each rank needed by itself (data, forward, backward), waiting for others left out.
            samples: what it computed in that time. A rank with none, or with a time that is not a positive number, is
                left out of this step.

        Returns:
            New counts, from the next step on, when it is worth a change; else None.
        """
        assert len(seconds) == len(samples) == len(self._speeds)
        self._steps.append(list(zip(map(float, seconds), samples, strict=True)))
        if len(self._steps) < self._config.every:
            return None
        steps, self._steps = self._steps, []
        self._remember([_window(list(rank)) for rank in zip(*steps, strict=True)])
        return self._decide()

    def out_of_memory(self, rank: int, failed_count: int) -> list[int]:
        """Lower the limit of `rank`, which could not hold `failed_count` samples, and return the new counts.

        Raises:
            PlanError: no limit would do; the message says what to change.
        """
        self._limits = shrunk(self._limits, rank, failed_count, total=self._batch_size)
        speeds = self._estimates()
        if speeds is None:
            self._counts = _initial(self._counts, self._batch_size, self._limits)
        else:
            self._counts = self._best(speeds)
        return self.counts

    def _remember(self, windows: Sequence[_Window | None]) -> None:
        equal_share = self._batch_size / len(self._speeds)
        for speed, window in zip(self._speeds, windows, strict=True):
            speed.add(window, self._config.history)
        noise = self._noise()
        for speed in self._speeds:
            speed.learn_overhead(equal_share, noise)
            speed.forget_before_change(self._config, noise)

    def _noise(self) -> float:
        """How far the windows of a usual rank scatter, relative to their level, as their own steps tell."""
        noises = [statistics.fmean(w.spread for w in speed.windows) for speed in self._speeds if speed.windows]
        return max(statistics.median(noises), 0.01) * _OF_MEDIAN / math.sqrt(self._config.every) if noises else 0.01

    def _estimates(self) -> list[_Estimate] | None:
        """Each rank's speed, None while one with samples is known too little.

        One without samples that is not known, or no longer, is taken to be as fast as any: so it will be tried.
        """
        noise = self._noise()
        measured = [speed.estimate(noise) if speed.windows else None for speed in self._speeds]
        known = [estimate for estimate in measured if estimate is not None]
        enough = [e is not None and e.windows >= self._config.patience for e in measured]
        if not known or not all(e for e, count in zip(enough, self._counts, strict=True) if count):
            return None
        hoped = _Estimate(min(e.seconds_per_sample for e in known), 0.0, 0.0, 0)
        return [estimate or hoped for estimate in measured]

    def _decide(self) -> list[int] | None:
        speeds = self._estimates()
        if speeds is None:
            return None
        evidence = min((s.windows for s, n in zip(speeds, self._counts, strict=True) if n), default=0)
        again = self._rest_on is not None and evidence >= self._rest_on * _MORE_EVIDENCE
        doubt = 0.0 if again else _CONFIDENCE
        gain = self._config.gain / 5 if again else self._config.gain
        best = self._best(speeds)
        now = max(s.step_s(n) / (1 + doubt * s.error) for s, n in zip(speeds, self._counts, strict=True))
        then = max(s.step_s(n) for s, n in zip(speeds, best, strict=True))
        worth = then < now * (1 - gain)
        if worth or again:
            self._rest_on = evidence
        if not worth:
            return None
        self._counts = best
        return self.counts

    def _best(self, speeds: Sequence[_Estimate]) -> list[int]:
        each = [speed.seconds_per_sample for speed in speeds]
        return best_counts(each, self._batch_size, self._limits, [s.overhead * s.seconds_per_sample for s in speeds])

    def state_dict(self) -> dict[str, Any]:
        """All that later shares depend on, as plain JSON."""
        return {
            "counts": list(self._counts),
            "limits": list(self._limits),
            "rest_on": self._rest_on,
            "steps": [[[s, n] for s, n in step] for step in self._steps],
            "speeds": [speed.state_dict() for speed in self._speeds],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict` of as many ranks and the same batch.

        Raises:
            CheckpointError: it is of other ranks or another batch; begin with a new balancer instead.
        """
        counts = state["counts"]
        if len(counts) != len(self._counts) or sum(counts) != self._batch_size:
            raise CheckpointError(
                f"got shares of {len(counts)} ranks and a batch of {sum(counts)}, expected {len(self._counts)} ranks "
                f"and {self._batch_size}; let shares begin anew where the ranks or the batch have changed"
            )
        self._counts = list(counts)
        self._limits = list(state["limits"])
        self._rest_on = state["rest_on"]
        self._steps = [[(s, n) for s, n in step] for step in state["steps"]]
        self._speeds = [_Speed.of(saved) for saved in state["speeds"]]


@dataclass(frozen=True)
class _Window:
    """Some steps of one rank, all with as many samples: their time, and how far one step scatters relative to it."""

    seconds: float
    samples: int
    spread: float


@dataclass(frozen=True)
class _Estimate:
    """How fast a rank is, with the relative standard error; `overhead` in samples, from so many `windows`."""

    seconds_per_sample: float
    overhead: float
    error: float
    windows: int

    def step_s(self, samples: int) -> float:
        return self.seconds_per_sample * (samples + self.overhead) if samples else 0.0


class _Speed:
    """One rank's windows since its speed last changed."""

    def __init__(self) -> None:
        self.windows: list[_Window] = []
        self.overhead = 0.0
        self.missed = 0

    def add(self, window: _Window | None, history: int) -> None:
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

    def forget_before_change(self, config: BalanceConfig, noise: float) -> None:
        """Drop the windows before a lasting change of speed."""
        levels = self._levels(self.overhead)
        recent, base = levels[-config.patience - 1 :], levels[: -config.patience - 1]
        if not base:
            return
        usual, scatter = _middle(base), max(noise, _spread(base) if len(base) > 1 else 0.0)
        least = 1 + max(_CONFIDENCE * scatter, config.gain)
        for deviates in ([x > usual * least for x in recent], [x * least < usual for x in recent]):
            if sum(deviates) >= config.patience:
                self.windows = self.windows[len(base) + deviates.index(True) :]
                return

    def estimate(self, noise: float) -> _Estimate:
        """The speed that the windows tell together."""
        levels = self._levels(self.overhead)
        scatter = max(noise, _spread(levels) if len(levels) > 1 else 0.0)
        error = scatter * _OF_MIDDLE / math.sqrt(len(levels))
        return _Estimate(_middle(levels), self.overhead, error, len(levels))

    def _levels(self, overhead: float) -> list[float]:
        return [window.seconds / (window.samples + overhead) for window in self.windows]

    def _misfit(self, overhead: float, noise: float) -> float:
        levels = self._levels(overhead)
        center = _middle(levels)
        return math.fsum(min((level / center - 1) ** 2, (_CONFIDENCE * noise) ** 2) for level in levels)

    def state_dict(self) -> dict[str, Any]:
        windows = [[w.seconds, w.samples, w.spread] for w in self.windows]
        return {"overhead": self.overhead, "missed": self.missed, "windows": windows}

    @classmethod
    def of(cls, state: dict[str, Any]) -> _Speed:
        speed = cls()
        speed.overhead, speed.missed = state["overhead"], state["missed"]
        speed.windows = [_Window(*window) for window in state["windows"]]
        return speed


def _window(steps: Sequence[tuple[float, int]]) -> _Window | None:
    """One rank's steps together; None unless most of them were measured, with the same number of samples."""
    measured = [(s, n) for s, n in steps if n > 0 and 0 < s < math.inf]
    if not measured:
        return None
    # The last batch of an epoch may be smaller: it tells another story.
    samples = statistics.median_low([n for _, n in measured])
    alike = [s for s, n in measured if n == samples]
    if 2 * len(alike) <= len(steps):
        return None
    return _Window(statistics.median(alike), samples, _spread(alike))


def _middle(values: Sequence[float]) -> float:
    """The mean of what is left when a quarter is dropped at either end."""
    drop = len(values) // 4
    return statistics.fmean(sorted(values)[drop : len(values) - drop])


def _spread(values: Sequence[float]) -> float:
    """The distance between the quartiles (the range, of fewer than 5) relative to the middle: about 1 to 2 sigma."""
    ordered = sorted(values)
    drop = (len(values) - 1) // 4
    return (ordered[len(values) - 1 - drop] - ordered[drop]) / _middle(values)


def _initial(weights: Sequence[float], total: int, limits: Sequence[int | None]) -> list[int]:
    """Divide in proportion where everybody gets something and no limit is passed; else as near to it as possible."""
    counts = divide(total, weights)
    fits = all(limit is None or count <= limit for count, limit in zip(counts, limits, strict=True))
    if fits and (total < len(counts) or all(counts)):
        return counts
    heaviest = max(weights)
    return best_counts([heaviest / max(weight, heaviest * 1e-6) for weight in weights], total, limits)


def _told(limits: Sequence[int | None]) -> str:
    return ", ".join(f"rank {i}: {limit}" for i, limit in enumerate(limits) if limit is not None)
