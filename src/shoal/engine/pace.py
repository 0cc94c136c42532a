"""At whose pace a rank goes: all in step, or each as fast as it can.

In step, every rank takes its share of every global batch. At their own pace, ranks lease parts of global batches one
after the other, whoever is ready first: so a slow rank trains on fewer samples and holds nobody up, and yet every
sample is used once. They meet where all have to look at the same model: before a validation, a checkpoint, an epoch's
end, and the end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from torch.distributed import Store

from shoal.data.loader import Batch, Loader
from shoal.engine.exchange.agreement import Verdict
from shoal.engine.progress import Progress

_ENDED = 1 << 40


class Leases:
    """A counter that all ranks share: numbers 0, 1, 2, ... below a limit, each given out once.

    `end` closes it early, at the next multiple of `unit` that has not been passed.
    """

    def __init__(self, store: Store, name: str, limit: int, unit: int) -> None:
        self._store = store
        self._name = name
        self._limit = limit
        self._unit = unit
        self._rest: int | None = None

    def claim(self) -> int | None:
        """The next number; None when there are no more."""
        if self._rest is None:
            number = self._store.add(self._name, 1) - 1
            if number < self._limit:
                return number
            if number < _ENDED:
                return None
            self._rest = int(self._store.get(f"{self._name}/ended"))
        number = self._rest + self._store.add(f"{self._name}/rest", 1) - 1
        return number if number < self.limit else None

    @property
    def limit(self) -> int:
        """Where the numbers end, as far as this rank knows."""
        if self._rest is None:
            return self._limit
        return min(self._limit, -(-self._rest // self._unit) * self._unit)

    def end(self) -> None:
        """Give out no more than the unit that was begun."""
        if self._rest is not None:
            return
        before = self._store.add(self._name, _ENDED) - _ENDED
        if before < _ENDED:
            self._store.set(f"{self._name}/ended", str(min(before, self._limit)))
        self._rest = int(self._store.get(f"{self._name}/ended"))


class Steps(Protocol):
    """What a pace needs of the loop."""

    progress: Progress

    def take(self, batch: Batch, reached: Progress, clock: int) -> Verdict:
        """Train one step; return what the ranks agreed on."""

    def wants_to_stop(self) -> bool:
        """Whether this rank asks to stop."""

    def settle(self) -> None:
        """Wait until everything that this rank has told others is known to them."""


class InStep:
    """Every rank in every step."""

    def __init__(self, loader: Loader, start: Progress) -> None:
        self._loader = loader
        self._batches: Iterator[Batch] = loader.batches(start.cursor)

    def divide(self, shares: tuple[float, ...], start: Progress) -> None:
        """From `start` on, divide batches by `shares`."""
        self._batches = self._loader.divided(shares).batches(start.cursor)

    def round(self, loop: Steps) -> Verdict:
        """One step."""
        batch, before = next(self._batches), loop.progress
        reached = dataclasses.replace(
            before, step=before.step + 1, cursor=batch.after, samples=before.samples + batch.size
        )
        return loop.take(batch, reached, before.step)


@dataclass(frozen=True)
class OwnPace:
    """Each rank as fast as it can, from meeting to meeting.

    Attributes:
        store: shared by all ranks, and used by nobody else in this process.
        sum: adds numbers up over all ranks.
        periods: the numbers of steps after whose multiples the ranks meet; 0s are passed over.
        last_step: the step at which training ends, if the plan says so.
    """

    store: Store
    sum: Callable[[list[float]], list[float]]
    loader: Loader
    world_size: int
    periods: tuple[int, ...]
    last_step: int | None

    def round(self, loop: Steps) -> Verdict:
        """All steps until the next meeting; its verdict says whether somebody ended it early."""
        start = loop.progress
        limit = self._next_meeting(start) - start.step
        leases = Leases(self.store, f"leases/{start.step}", limit * self.world_size, self.world_size)
        wished = False
        while (number := leases.claim()) is not None:
            ahead, slot = divmod(number, self.world_size)
            cursor, samples = self.loader.after(start.cursor, ahead)
            batch = self.loader.part(cursor, slot)
            done = start.samples + samples + batch.size * (slot + 1) // self.world_size
            clock = start.step + ahead
            loop.take(
                batch, dataclasses.replace(loop.progress, step=clock + 1, cursor=batch.after, samples=done), clock
            )
            if loop.wants_to_stop() and not wished:
                wished = True
                leases.end()
        loop.settle()
        stop = self.sum([float(wished)])[0] > 0
        steps = min(limit, leases.limit // self.world_size) if stop else limit
        cursor, samples = self.loader.after(start.cursor, steps)
        loop.progress = dataclasses.replace(
            loop.progress, step=start.step + steps, cursor=cursor, samples=start.samples + samples
        )
        return Verdict(loop.progress.loss, [], stop)

    def _next_meeting(self, start: Progress) -> int:
        step = start.step
        candidates = [(step // period + 1) * period for period in self.periods if period]
        candidates.append(step + self.loader.steps_per_epoch - start.cursor.step % self.loader.steps_per_epoch)
        if self.last_step is not None:
            candidates.append(self.last_step)
        return max(step, min(candidates))
