"""Each rank's share of the global batch follows its measured speed, while training runs.

Every rank feeds the same measurements of all ranks, so all come to the same shares with no further message, on unlike
machines too: see `speed`, where it is told how fast a rank is.

Shares change when the step would become shorter even if the slowest rank were as fast as its measurements could mean.
Shares that were made from few windows are looked at again, without that caution, when there are three times as many.

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
from shoal.data.speed import CONFIDENCE, OF_MEDIAN, Estimate, Speed, Window, window_of
from shoal.errors import PlanError
from shoal.strict_toml import STRICT

_MORE_EVIDENCE = 3
"""Shares are looked at again when there are so many times the windows that they rest on."""


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
        self._limits: list[int | None] = list(limits) if limits is not None else [None] * num_ranks
        self._counts = _initial(shares if shares is not None else [1.0] * num_ranks, batch_size, self._limits)
        self._speeds = [Speed() for _ in range(num_ranks)]
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
        self._remember([window_of(list(rank)) for rank in zip(*steps, strict=True)])
        return self._decide()

    def out_of_memory(self, rank: int, failed_count: int) -> list[int]:
        """Lower the limit of `rank`, which could not hold `failed_count` samples, and return the new counts.

        Raises:
            PlanError: no limit would do; the message says what to change.
        """
        self._limits = shrunk(self._limits, rank, failed_count, total=self._batch_size)
        self._counts = self._settled(self._counts)
        return self.counts

    def _remember(self, windows: Sequence[Window | None]) -> None:
        equal_share = self._batch_size / len(self._speeds)
        for speed, window in zip(self._speeds, windows, strict=True):
            speed.add(window, self._config.history)
        noise = self._noise()
        for speed in self._speeds:
            speed.learn_overhead(equal_share, noise)
            speed.forget_before_change(self._config.patience, self._config.gain, noise)

    def _noise(self) -> float:
        """How far the windows of a usual rank scatter, relative to their level, as their own steps tell."""
        noises = [statistics.fmean(w.spread for w in speed.windows) for speed in self._speeds if speed.windows]
        return max(statistics.median(noises), 0.01) * OF_MEDIAN / math.sqrt(self._config.every) if noises else 0.01

    def _estimates(self) -> list[Estimate] | None:
        """Each rank's speed, None while one with samples is known too little.

        One without samples that is not known, or no longer, is taken to be as fast as any: so it will be tried.
        """
        noise = self._noise()
        measured = [speed.estimate(noise) if speed.windows else None for speed in self._speeds]
        known = [estimate for estimate in measured if estimate is not None]
        enough = [e is not None and e.windows >= self._config.patience for e in measured]
        if not known or not all(e for e, count in zip(enough, self._counts, strict=True) if count):
            return None
        hoped = Estimate(min(e.seconds_per_sample for e in known), 0.0, 0.0, 0)
        return [estimate or hoped for estimate in measured]

    def _decide(self) -> list[int] | None:
        speeds = self._estimates()
        if speeds is None:
            return None
        evidence = min((s.windows for s, n in zip(speeds, self._counts, strict=True) if n), default=0)
        again = self._rest_on is not None and evidence >= self._rest_on * _MORE_EVIDENCE
        doubt = 0.0 if again else CONFIDENCE
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

    def _best(self, speeds: Sequence[Estimate]) -> list[int]:
        each = [speed.seconds_per_sample for speed in speeds]
        return best_counts(each, self._batch_size, self._limits, [s.overhead * s.seconds_per_sample for s in speeds])

    @property
    def seconds_per_sample(self) -> list[float] | None:
        """Of each rank, as far as is known; None while one with samples is known too little."""
        speeds = self._estimates()
        return None if speeds is None else [speed.seconds_per_sample for speed in speeds]

    def admit(self, ranks: Sequence[int]) -> list[int]:
        """Give samples to ranks that could take none so far (their limit was 0), and return the new counts."""
        for rank in ranks:
            self._limits[rank] = None
        others = [count for count in self._counts if count]
        usual = max(1.0, statistics.fmean(others)) if others else 1.0
        self._counts = self._settled([count or usual for count in self._counts])
        return self.counts

    def known(self) -> list[dict[str, Any]]:
        """What is known of each rank, as plain JSON: for `learn`, of a balancer of these ranks or others."""
        pairs = zip(self._limits, self._speeds, strict=True)
        return [{"limit": limit, "speed": speed.state_dict()} for limit, speed in pairs]

    def learn(self, known: Sequence[dict[str, Any] | None]) -> list[int]:
        """Begin with what is known of each rank (None: nothing), and return the counts that follow.

        Limits that were given to this balancer stay.

        Raises:
            PlanError: the ranks together can hold less than the batch.
        """
        for rank, told in enumerate(known):
            if told is not None:
                limits: list[int] = [limit for limit in (self._limits[rank], told["limit"]) if limit is not None]
                self._limits[rank] = min(limits, default=None)
                self._speeds[rank] = Speed.of(told["speed"])
        self._counts = self._settled(self._counts)
        return self.counts

    def _settled(self, weights: Sequence[float]) -> list[int]:
        """The best counts by what is known; by the weights, where that is too little."""
        speeds = self._estimates()
        return _initial(weights, self._batch_size, self._limits) if speeds is None else self._best(speeds)


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
