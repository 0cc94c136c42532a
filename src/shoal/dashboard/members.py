"""Who trained together when: the views of an elastic run, what each change cost, and the faults that were rehearsed."""

from __future__ import annotations

from dataclasses import dataclass, field

from shoal.events import Event
from shoal.units import format_duration

_MAX_LINES = 12


@dataclass(slots=True)
class ViewRecord:
    """One view, as its members told. `held_s`: how long the slowest of them stood still for it."""

    epoch: int
    cause: str
    planned: bool
    step: int
    seats: list[int]
    held_s: float = 0.0
    seconds: float = 0.0


@dataclass(slots=True)
class Members:
    """All views of a run's latest attempt.

    Attributes:
        speaker: the seat of rank 0, whose word counts for the run.
        beginners: the seats that told of the first view.
        is_ahead: the first view has been told of, and the beginning of the attempt has not: each worker tells it after.
    """

    views: dict[int, ViewRecord] = field(default_factory=dict)
    speaker: int = 0
    beginners: set[int] = field(default_factory=set)
    is_ahead: bool = False

    def add(self, event: Event, seat: int, seconds: float) -> None:
        """Take in a `view` event."""
        epoch = int(event.get("epoch") or 0)
        seats = [int(other) for other in event.get("seats") or ()]
        planned = bool(event.get("planned"))
        made = ViewRecord(epoch, str(event.get("cause") or ""), planned, int(event.get("step") or 0), seats)
        view = self.views.setdefault(epoch, made)
        view.seconds = view.seconds or seconds
        stood = sum(float(event.get(name) or 0.0) for name in ("connect_s", "state_s", "build_s"))
        if not event.get("took_state"):
            view.held_s = max(view.held_s, float(event.get("lost_s") or stood))
        if event.get("rank") == 0 and epoch == max(self.views):
            self.speaker = seat
        if epoch == 1:
            self.is_ahead = self.is_ahead or not self.beginners
            self.beginners.add(seat)

    def includes(self, seat: int) -> bool:
        """Whether a seat was in any view: what befell one that never came in is no matter of the run's."""
        return any(seat in view.seats for view in self.views.values())

    def lines(self) -> list[str]:
        """A sentence for each change, the latest ones if there were many."""
        changes = sorted(self.views.values(), key=lambda view: view.epoch)[1:]
        shown = changes[-_MAX_LINES:]
        lines = [f"{len(changes) - len(shown)} earlier changes"] if len(changes) > len(shown) else []
        return lines + [
            f"step {view.step:,}: {view.cause}; {len(view.seats)} went on after {format_duration(view.held_s)}"
            for view in shown
        ]
