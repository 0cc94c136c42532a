"""How the ranks of a view divide each global batch: as the plan says, as speeds say, and nothing for newcomers.

One place decides it, from what all ranks have told each other, so that all decide alike: pure, without clock or rank.
A newcomer without state has no share; once every newcomer has its state, all are given one. Where the plan asks for
balance, shares follow speeds (`data.balance`), and a rank that ran out of memory gets less from then on.

What ranks tell of their speed is a step old: it is laid beside what they computed in that step.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shoal.data.balance import BalanceConfig, Balancer
from shoal.data.partition import divide
from shoal.engine.exchange.agreement import Verdict

_SETTLING_STEPS = 2
"""After a beginning or a change: loaders start anew, memory is taken for the first time. Such a step tells nothing."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One step: what each rank computed, how long it waited for its samples, and how long it computed."""

    samples: tuple[int, ...]
    data_s: tuple[float, ...]
    compute_s: tuple[float, ...]

    @property
    def seconds(self) -> list[float]:
        """Each rank's own time; 0 where it did not tell."""
        pairs = zip(self.data_s, self.compute_s, strict=True)
        return [data + compute if compute > 0 else 0.0 for data, compute in pairs]


class Division:
    """The shares of one view."""

    def __init__(
        self,
        shares: Sequence[float],
        batch_size: int,
        *,
        cold: Collection[int] = (),
        balance: BalanceConfig | None = None,
        seats: Sequence[int] | None = None,
        known: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin.

        Args:
            shares: a weight for each rank (under a layout: for each shard of each replica).
            cold: ranks without state, which get nothing until all have theirs.
            balance: let shares follow speeds; None: they stay.
            seats: what names each rank beyond this view; default: its number.
            known: what was known before of each seat; it does not hold for newcomers.

        Raises:
            PlanError: the ranks together can hold less than the batch.
        """
        self._given = tuple(shares)
        self._batch_size = batch_size
        self._cold = frozenset(cold)
        self._seats = [str(seat) for seat in (range(len(shares)) if seats is None else seats)]
        self._balancer: Balancer | None = None
        if balance is not None:
            limits = [0 if rank in self._cold else None for rank in range(len(shares))]
            weights = [0.0 if rank in self._cold else share for rank, share in enumerate(shares)]
            self._balancer = Balancer(len(shares), batch_size, balance, weights, limits)
            told = dict(known or {})
            self._balancer.learn([None if r in self._cold else told.get(seat) for r, seat in enumerate(self._seats)])
        self._last: tuple[int, ...] | None = None
        self._settling = _SETTLING_STEPS

    @property
    def shares(self) -> tuple[float, ...]:
        """A weight for each rank, for the next step."""
        if self._balancer is not None:
            return tuple(map(float, self._balancer.counts))
        return tuple(0.0 if rank in self._cold else share for rank, share in enumerate(self._given))

    @property
    def counts(self) -> list[int]:
        """The samples of a whole global batch for each rank."""
        return divide(self._batch_size, self.shares)

    @property
    def seconds_per_sample(self) -> list[float] | None:
        """Of each rank, as far as it is measured and asked for."""
        return self._balancer.seconds_per_sample if self._balancer is not None else None

    @property
    def known(self) -> dict[str, Any]:
        """What the next view, or a resumed run, should know of each seat, as plain JSON."""
        if self._balancer is None:
            return {}
        told = zip(self._seats, self._balancer.known(), strict=True)
        return {seat: one for rank, (seat, one) in enumerate(told) if rank not in self._cold}

    def committed(self, batch_size: int, verdict: Verdict) -> Measured | None:
        """A step on `batch_size` samples counts: return what its verdict tells of the step before, if it is of use."""
        samples, self._last = self._last, None
        if self._settling:
            self._settling -= 1
        else:
            self._last = tuple(divide(batch_size, self.shares))
        if samples is None or not any(verdict.compute_s):
            return None
        return Measured(samples=samples, data_s=tuple(verdict.data_s), compute_s=tuple(verdict.compute_s))

    def follow(self, measured: Measured | None, *, cold: bool) -> bool:
        """Decide after a step; return whether shares change from the next one on.

        Args:
            measured: what `committed` gave.
            cold: there are still newcomers without state.
        """
        if self._cold and not cold:
            newcomers, self._cold = sorted(self._cold), frozenset()
            if self._balancer is not None:
                self._balancer.admit(newcomers)
            changed = True
        elif measured is not None and self._balancer is not None:
            changed = self._balancer.observe(measured.seconds, measured.samples) is not None
        else:
            changed = False
        if changed:
            self._settling = _SETTLING_STEPS
        return changed

    def dropped(self, batch_size: int, short_ranks: Sequence[int]) -> None:
        """A step on `batch_size` samples was dropped, since these ranks ran out of memory: give them less.

        Raises:
            PlanError: nothing would be small enough, or the others cannot take the rest.
        """
        assert self._balancer is not None, "steps are dropped only where shares may shrink"
        counts = divide(batch_size, self.shares)
        for rank in short_ranks:
            self._balancer.out_of_memory(rank, counts[rank])
        self._last, self._settling = None, _SETTLING_STEPS
