"""The members of a run that its launcher did not start: workers that `shoal join` started, on other machines mostly.

The launcher holds no process of theirs. It knows that they are there from their seats, and what becomes of them from
the coordinator, which it asks once its own workers have ended: until then these are reason enough to stay.
"""

from __future__ import annotations

import time

from shoal.cluster.seats import Seats
from shoal.errors import CoordinatorError
from shoal.launch.coordinator import CoordinatorProcess

_ASK_S = 0.25
_ANSWER_S = 2.0
_SILENT_S = 30.0  # a coordinator that lives and does not answer for so long cannot tell of anybody
_OVER = ("finishing", "ended", "failed")


class Joined:
    """Used by one launcher, on one thread."""

    def __init__(self, seats: Seats, coordinator: CoordinatorProcess, *, patience_s: float) -> None:
        """`patience_s`: for how long they may still be about to leave once training is over."""
        self._seats = seats
        self._coordinator = coordinator
        self._patience_s = patience_s
        self._ask_at = 0.0
        self._over_at: float | None = None
        self._silent_since: float | None = None
        self._remain = True
        self._told_to_stop = False

    def seats(self) -> set[int]:
        """Every seat that they have had."""
        return self._seats.others()

    def remain(self, *, stop: bool) -> bool:
        """Whether any train, or wait to. `stop`: they are to stop after the step at hand, and save."""
        now = time.monotonic()
        if now < self._ask_at:
            return self._remain
        self._ask_at, self._remain = now + _ASK_S, bool(self.seats()) and self._ask(now, stop)
        return self._remain

    def _ask(self, now: float, stop: bool) -> bool:
        try:
            if stop and not self._told_to_stop:
                self._coordinator.ask("stop", timeout_s=_ANSWER_S)
                self._told_to_stop = True
            status = self._coordinator.ask("status", timeout_s=_ANSWER_S)
        except CoordinatorError:  # it is being started again, and then knows
            self._silent_since = self._silent_since or now
            return now - self._silent_since <= _SILENT_S
        self._silent_since = None
        if status["state"] in _OVER:
            self._over_at = self._over_at or now
            if now - self._over_at > self._patience_s:
                return False
        return bool(status["members"] or status["waiting"])
