"""Each rank as fast as it can: ranks lease parts of global batches one after the other, whoever is ready first.

So a slow rank trains on fewer samples and holds nobody up, and yet every sample is used once. Ranks meet where all have
to look at the same model: before a validation, a checkpoint, an epoch's end, and the end. What lies between two
meetings is a *round*; a part has a number in it.

Where ranks come and go, a round may be broken off: whoever is left tells which parts its values have learned from, and
the rest is leased again in the next view, cut as it was. A planned change waits for a meeting, which is called as soon
as all are ready for it.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch.distributed import Store

from shoal.data.loader import Loader
from shoal.engine.exchange.agreement import Verdict
from shoal.engine.exchange.base import Keeper
from shoal.engine.pace import Steps
from shoal.engine.progress import Progress
from shoal.engine.turnover import Turnover
from shoal.errors import PeerLostError
from shoal.wire.groups import failures_as_lost_peers

_ENDED = 1 << 40
_TICK_S = 0.05
T = TypeVar("T")


class Leases:
    """A counter that all ranks share: some numbers below a limit, each given out once.

    `end` closes it early, at the next multiple of `unit` that is beyond all that was given out, and not below `floor`.
    """

    def __init__(
        self, store: Store, name: str, limit: int, unit: int, *, numbers: Sequence[int] | None = None, floor: int = 0
    ) -> None:
        """`numbers`: those to give out, rising; default: all."""
        self._store = store
        self._name = name
        self._limit = limit
        self._unit = unit
        self._numbers = range(limit) if numbers is None else numbers
        self._floor = floor
        self._rest: int | None = None

    def claim(self) -> int | None:
        """The next number; None when there are no more."""
        if self._rest is None:
            place = self._store.add(self._name, 1) - 1
            if place < len(self._numbers):
                return self._numbers[place]
            if place < _ENDED:
                return None
            self._rest = int(self._store.get(f"{self._name}/ended"))
        place = self._rest + self._store.add(f"{self._name}/rest", 1) - 1
        number = self._numbers[place] if place < len(self._numbers) else self._limit
        return number if number < self.limit else None

    @property
    def limit(self) -> int:
        """Where the numbers end, as far as this rank knows."""
        if self._rest is None:
            return self._limit
        beyond = max(self._floor, self._numbers[self._rest - 1] + 1 if self._rest else 0)
        return min(self._limit, -(-beyond // self._unit) * self._unit)

    def end(self) -> None:
        """Give out no more than the unit that was begun."""
        if self._rest is not None:
            return
        before = self._store.add(self._name, _ENDED) - _ENDED
        if before < _ENDED:
            self._store.set(f"{self._name}/ended", str(min(before, len(self._numbers))))
        self._rest = int(self._store.get(f"{self._name}/ended"))


@dataclass(frozen=True, kw_only=True)
class Round:
    """The parts between two meetings.

    Attributes:
        unit: the parts of a global batch.
        limit: the number of parts.
        used: the numbers of those that this rank knows to be learned from.
    """

    unit: int
    limit: int
    used: frozenset[int] = frozenset()

    def to_plain(self) -> dict[str, Any]:
        """As plain values, for another rank."""
        return dataclasses.asdict(self) | {"used": sorted(self.used)}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Round:
        """The inverse of `to_plain`."""
        return cls(**(plain | {"used": frozenset(plain["used"])}))


class Ranks(Protocol):
    """What a pace needs of a view; `wire.groups.World` has it.

    Attributes:
        store: shared by all ranks.
    """

    store: Store
    rank: int
    size: int

    @property
    def is_cut(self) -> bool:
        """Whether the view has ended."""

    def sum(self, values: Sequence[float]) -> list[float]:
        """Add numbers up over all ranks."""


@dataclass(frozen=True, kw_only=True)
class PaceConfig:
    """When ranks at their own pace meet.

    Attributes:
        periods: the numbers of steps after whose multiples the ranks meet; 0s are passed over.
        last_step: the step at which training ends, if the plan says so.
    """

    periods: tuple[int, ...]
    last_step: int | None


class OwnPace:
    """Each rank as fast as it can, from meeting to meeting."""

    def __init__(
        self,
        config: PaceConfig,
        world: Ranks,
        loader: Loader,
        turnover: Turnover,
        *,
        keeper: Keeper | None = None,
        midway: Round | None = None,
    ) -> None:
        """Begin.

        Args:
            keeper: knows which parts were learned from, where ranks come and go.
            midway: a round that another view began and did not end.
        """
        self._config = config
        self._world = world
        self._store = world.store.clone()  # type: ignore[attr-defined]  # a client waits with its lock held
        self._loader = loader
        self._turnover = turnover
        self._keeper = keeper
        self._midway = midway
        self._claims = ThreadPoolExecutor(1, thread_name_prefix="shoal-leases")
        self._is_open = False

    @property
    def midway(self) -> Round | None:
        """The round that was begun and is not over, with what is known of it now."""
        if self._midway is None or self._keeper is None or not self._is_open:
            return self._midway
        return dataclasses.replace(self._midway, used=self._keeper.used)

    def round(self, loop: Steps) -> Verdict:
        """All steps until the next meeting; its verdict says whether somebody ended it early.

        Raises:
            PeerLostError: the view ended before; `progress` is then that of the round's beginning, see `midway`.
        """
        start = loop.progress
        try:
            return self._round(loop, start)
        except PeerLostError:
            loop.progress = dataclasses.replace(start, seconds=loop.progress.seconds)
            raise

    def _round(self, loop: Steps, start: Progress) -> Verdict:
        size = self._world.size
        is_new = self._midway is None
        self._midway = current = self._midway or Round(unit=size, limit=self._num_steps(start) * size)
        loader = self._loader if is_new else self._loader.divided((1.0,) * current.unit, 0)
        leases = self._open(start, current)
        wished = told = False
        while (number := self._ask(leases.claim)) is not None:
            if self._keeper is not None:
                self._keeper.lease(number)
            self._train(loop, loader, start, current, number)
            if loop.wants_to_stop() and not wished:
                wished = True
                self._ask(leases.end)
            if not told and self._turnover.is_ready():
                told = True
                self._call_meeting(leases, start)
        loop.settle()
        stops, ready = self._world.sum([float(wished), float(self._turnover.is_ready())])
        if self._keeper is not None:
            self._keeper.meet()
        self._midway, self._is_open = None, False
        steps = leases.limit // current.unit
        cursor, samples = loader.after(start.cursor, steps)
        loop.progress = dataclasses.replace(
            loop.progress, step=start.step + steps, cursor=cursor, samples=start.samples + samples
        )
        return Verdict(loop.progress.loss, [], stops > 0, turn=ready == size)

    def _open(self, start: Progress, current: Round) -> Leases:
        name = f"leases/{start.step}"
        if self._keeper is None:
            return Leases(self._store, name, current.limit, current.unit)
        used = self._keeper.open_round(start.step, current.limit, current.used)
        self._is_open = True
        numbers = [number for number in range(current.limit) if number not in used] if used else None
        floor = max(used, default=-1) + 1
        return Leases(self._store, name, current.limit, current.unit, numbers=numbers, floor=floor)

    def _train(self, loop: Steps, loader: Loader, start: Progress, current: Round, number: int) -> None:
        ahead, slot = divmod(number, current.unit)
        cursor, samples = loader.after(start.cursor, ahead)
        batch = loader.part(cursor, slot)
        done = start.samples + samples + batch.size * (slot + 1) // current.unit
        clock = start.step + ahead
        reached = dataclasses.replace(loop.progress, step=clock + 1, cursor=batch.after, samples=done)
        loop.take(batch, reached, clock)

    def _call_meeting(self, leases: Leases, start: Progress) -> None:
        """The last one to be ready for the next view ends the round."""
        if self._ask(lambda: self._store.add(f"ready/{start.step}", 1)) == self._world.size:
            self._ask(leases.end)

    def _ask(self, question: Callable[[], T]) -> T:
        """Ask the store, as long as there is this view: who holds the store may have gone.

        Raises:
            PeerLostError: the view ended, or the store.
        """
        asked = self._claims.submit(question)
        while not self._world.is_cut:
            with failures_as_lost_peers("leasing samples"):
                if concurrent.futures.wait([asked], _TICK_S).done:
                    return asked.result()
        raise PeerLostError("the view ended in the middle of a round")

    def _num_steps(self, start: Progress) -> int:
        step = start.step
        candidates = [(step // period + 1) * period for period in self._config.periods if period]
        candidates.append(step + self._loader.steps_per_epoch - start.cursor.step % self._loader.steps_per_epoch)
        if self._config.last_step is not None:
            candidates.append(self._config.last_step)
        return max(0, min(candidates) - step)
