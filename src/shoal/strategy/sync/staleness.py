"""How stale a parameter server may be: bsp, ssp(s) and async as one state machine, without sockets or tensors.

Each worker counts its own steps: its update of step t carries clock t (from 0), and before step c it pulls with clock
c. A worker's *applied clock* is the number of its updates that are in the values.

* **bsp**: the updates of clock t are summed and applied once, when all workers' have come; a pull of clock c waits
  until clocks 0 to c - 1 are applied. So every worker computes on the same values.
* **ssp(s)** (stale synchronous parallel, Ho et al. 2013): an update is applied when it comes; a pull of clock c waits
  until the slowest worker's applied clock is at least c - s.
* **async** (Hogwild's, Recht et al. 2011, over a network): an update is applied and a pull answered at once.

Every update is applied exactly once: it is known by (worker, sequence), and one that comes again is a `Duplicate`.
A machine never forgets a sequence that may come again; each update says which (`oldest`), so memory stays small.

Workers may change (`members_changed`). What a lost one did not bring of a step, another brings in its name: an update
that is marked so is a `Duplicate` if the worker's own of that clock is there.

Event in, instructions out. One machine stands for one key; who obeys it is `servers/`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

Mode = Literal["bsp", "ssp", "async"]


@dataclass(frozen=True, slots=True)
class UpdateId:
    """An update's name: unique for ever within a job."""

    worker: int
    sequence: int


@dataclass(frozen=True, slots=True)
class Apply:
    """Sum these updates in this order, then take one step of the optimizer."""

    updates: tuple[UpdateId, ...]


@dataclass(frozen=True, slots=True)
class Hold:
    """Keep this update's values until an `Apply` names it."""

    update: UpdateId


@dataclass(frozen=True, slots=True)
class Duplicate:
    """This update has come before: acknowledge it again and do nothing else."""

    update: UpdateId


@dataclass(frozen=True, slots=True)
class Refuse:
    """This update contradicts what came before; `reason` is for the worker."""

    update: UpdateId
    reason: str


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer the pull of this token with the values as they are now."""

    token: Any


Instruction = Apply | Hold | Duplicate | Refuse | Answer


@dataclass(slots=True)
class _Seen:
    """Which sequences of one worker have come: all below `low`, and those in `above`."""

    low: int = 0
    above: set[int] = field(default_factory=set)

    def add(self, sequence: int, oldest: int) -> bool:
        """Whether it is new."""
        if oldest > self.low:
            self.low = oldest
            self.above = {number for number in self.above if number >= oldest}
        if sequence < self.low or sequence in self.above:
            return False
        self.above.add(sequence)
        return True


class Staleness:
    """The machine of one key."""

    def __init__(self, mode: Mode, workers: Iterable[int], *, bound: int = 0, start_clock: int = 0) -> None:
        """Start with no update applied.

        Args:
            workers: the ranks that bsp and ssp wait for; async takes updates of anybody.
            bound: ssp's s, >= 0: how many steps a worker may be ahead of the slowest. The other modes ignore it.
            start_clock: the clock of the first updates to come, more than 0 after a resume.
        """
        assert bound >= 0, f"a staleness bound of {bound} steps"
        self._mode = mode
        self._bound = bound if mode == "ssp" else 0
        self._start = start_clock
        self._applied = dict.fromkeys(workers, start_clock)
        self._seen: dict[int, _Seen] = {}
        self._ahead: dict[int, set[int]] = {}  # clocks applied before an earlier one, which a new connection can cause
        self._held: dict[int, dict[int, UpdateId]] = {}  # clock -> worker -> update
        self._waiting: list[tuple[int, Any]] = []  # (clock that must be applied, token)

    @property
    def applied_clock(self) -> int:
        """The slowest worker's applied clock; where nobody is waited for, the highest clock that began."""
        return min(self._applied.values(), default=self._start)

    @property
    def clocks(self) -> dict[int, int]:
        """By worker, the applied clock; nobody in async, where none is waited for."""
        return dict(self._applied)

    @property
    def num_waiting(self) -> int:
        """Pulls not yet answered."""
        return len(self._waiting)

    def update_came(
        self, worker: int, sequence: int, clock: int, oldest: int = 0, *, in_name: bool = False
    ) -> list[Instruction]:
        """Worker `worker`'s update of step `clock` is here.

        Args:
            sequence: the update's number; a repeated update has the same.
            oldest: this worker will not repeat a sequence lower than this.
            in_name: it comes from another worker, in case the worker's own does not.
        """
        update = UpdateId(worker, sequence)
        if in_name and worker in self._applied and self._has(worker, clock):
            return [Duplicate(update)]
        reason = self._contradiction(worker, sequence, clock)
        if reason:
            return [Refuse(update, reason)]
        if not self._seen.setdefault(worker, _Seen()).add(sequence, oldest):
            return [Duplicate(update)]
        if self._mode == "bsp":
            self._held.setdefault(clock, {})[worker] = update
            return [Hold(update), *self._apply_complete_clocks()]
        if worker in self._applied:
            self._advance(worker, clock)
        return [Apply((update,)), *self._release()]

    def pull_came(self, clock: int, token: Any) -> list[Instruction]:
        """A worker that has finished `clock` steps asks for the values. `token` names its request."""
        if self._mode == "async" or self.applied_clock >= clock - self._bound:
            return [Answer(token)]
        self._waiting.append((clock - self._bound, token))
        return []

    def worker_left(self, worker: int) -> list[Instruction]:
        """Nobody waits for this worker any more. Its updates that are here still count."""
        self._applied.pop(worker, None)
        return self._apply_complete_clocks() if self._mode == "bsp" else self._release()

    def members_changed(self, workers: Iterable[int], clock: int) -> None:
        """From `clock` on, these workers are waited for; whoever waits now is forgotten.

        Nothing of an earlier clock may be missing: an update that is held is dropped.
        """
        self._applied, self._start = dict.fromkeys(workers, clock), clock
        self._ahead.clear()
        self._held.clear()
        self._waiting.clear()

    def _has(self, worker: int, clock: int) -> bool:
        """Whether a worker's update of `clock` has come."""
        applied = clock < self._applied[worker] or clock in self._ahead.get(worker, ())
        return applied or worker in self._held.get(clock, {})

    def _contradiction(self, worker: int, sequence: int, clock: int) -> str | None:
        seen = self._seen.get(worker, _Seen())
        known = sequence < seen.low or sequence in seen.above
        if known or self._mode == "async":
            return None
        if worker not in self._applied:
            return f"worker {worker} is not among those this training waits for ({sorted(self._applied)})"
        if clock < self._applied[worker] or clock in self._ahead.get(worker, ()):
            return f"an update of clock {clock} came, but one of clock {self._applied[worker]} was expected"
        if self._mode == "bsp" and worker in self._held.get(clock, {}):
            return f"a second update of clock {clock} came from worker {worker}"
        return None

    def _advance(self, worker: int, clock: int) -> None:
        ahead = self._ahead.setdefault(worker, set())
        ahead.add(clock)
        while self._applied[worker] in ahead:
            ahead.remove(self._applied[worker])
            self._applied[worker] += 1

    def _apply_complete_clocks(self) -> list[Instruction]:
        instructions: list[Instruction] = []
        while self._held:
            clock = min(self._held)
            missing = self._applied.keys() - self._held[clock].keys()
            if missing or clock > self.applied_clock:
                break
            updates = self._held.pop(clock)
            instructions.append(Apply(tuple(updates[worker] for worker in sorted(updates))))
            self._applied = dict.fromkeys(self._applied, clock + 1)
            self._start = clock + 1
        return instructions + self._release()

    def _release(self) -> list[Instruction]:
        now = self.applied_clock if self._applied else None
        ready = [token for clock, token in self._waiting if now is None or now >= clock]
        self._waiting = [(clock, token) for clock, token in self._waiting if now is not None and now < clock]
        return [Answer(token) for token in ready]
