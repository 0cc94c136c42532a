"""Whether a run trained on every sample exactly once an epoch, read from its event log alone.

A step may be in the log more than once: some ranks committed it in a view that was then lost, or an attempt went on
from an older checkpoint. A view undoes whatever earlier ones did beyond the step that it begins with; what is left is
what the model was trained on. For ranks that go in step: one global batch a step, divided among all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from shoal.events import Event

Spans = dict[int, list[tuple[int, int]]]
"""Epoch -> (start, end) of positions in its order; `end` is outside."""


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What was found.

    Attributes:
        epochs: how many epochs were looked at: those that the run went beyond, and the last if it is full.
        missing, twice: the positions of an epoch that no step took, or more than one did.
        disputed: steps of which ranks told different batches, or of which the shares do not make up the batch.
    """

    epochs: int
    missing: Spans = field(default_factory=dict)
    twice: Spans = field(default_factory=dict)
    disputed: tuple[int, ...] = ()

    @property
    def is_clean(self) -> bool:
        """Whether every epoch had every sample once."""
        return not (self.missing or self.twice or self.disputed)


def audit(events: Iterable[Event], samples: int | None = None) -> Audit:
    """Audit a run by its events, which are in order of time.

    Args:
        samples: of an epoch; default: as many as the longest epoch had.
    """
    taken: Spans = {}
    disputed = []
    for step, told in sorted(_lasting(events).items()):
        batch = told.batches[0]
        taken.setdefault(batch.epoch, []).append((batch.first, batch.first + batch.size))
        incomplete = len(told.batches) == told.num_ranks and sum(told.shares) != batch.size
        if incomplete or len(set(told.batches)) > 1:
            disputed.append(step)
    ends = {epoch: max(end for _, end in spans) for epoch, spans in taken.items()}
    size = max(ends.values(), default=0) if samples is None else samples
    last = max(ends, default=-1)
    looked_at = [epoch for epoch in range(last + 1) if epoch < last or ends[epoch] >= size]
    faults = {epoch: _faults(sorted(taken.get(epoch, [])), size) for epoch in looked_at}
    return Audit(
        epochs=len(looked_at),
        missing={epoch: missing for epoch, (missing, _) in faults.items() if missing},
        twice={epoch: twice for epoch, (_, twice) in faults.items() if twice},
        disputed=tuple(disputed),
    )


class _Batch(NamedTuple):
    epoch: int
    first: int
    size: int


@dataclass
class _Told:
    """What the ranks of one view told of one step; `num_ranks` is 0 in a run without views."""

    num_ranks: int
    batches: list[_Batch] = field(default_factory=list)
    shares: list[int] = field(default_factory=list)


@dataclass(eq=False)
class _View:
    """One rank's stay in a view. `start` is the step that the view began with."""

    attempt: str
    epoch: int = 0
    start: int | None = None
    num_ranks: int = 0


def _lasting(events: Iterable[Event]) -> dict[int, _Told]:
    """For each step what was told of it in the view whose work lasted."""
    views: dict[tuple[str, int], list[tuple[_View, Event]]] = {}
    order: list[str] = []  # attempts, in order of time
    for view, event in list(_placed(events)):
        if view.attempt not in order:
            order.append(view.attempt)
        views.setdefault((view.attempt, view.epoch), []).append((view, event))
    lasting: dict[int, _Told] = {}
    undone_beyond = float("inf")
    for key in sorted(views, key=lambda key: (order.index(key[0]), key[1]), reverse=True):
        steps = [event for _, event in views[key] if event["kind"] == "step"]
        starts = [view.start for view, _ in views[key] if view.start is not None]
        num_ranks = max(view.num_ranks for view, _ in views[key])
        for event in steps:
            step = int(event["step"])
            if step <= undone_beyond:
                told = lasting.setdefault(step, _Told(num_ranks))
                told.batches.append(_Batch(int(event["epoch"]), int(event["first"]), int(event["samples"])))
                told.shares.append(int(event["share"]))
        starts += [int(event["step"]) - 1 for event in steps]
        undone_beyond = min([undone_beyond, *starts])
    return lasting


def _placed(events: Iterable[Event]) -> Iterator[tuple[_View, Event]]:
    """Each `view` and `step` with the view in which it was written. Only good once all events have been read.

    A process tells of its attempt right after its first view.
    """
    current: dict[str, _View] = {}
    for event in events:
        source, kind = str(event["source"]), event["kind"]
        before = current.get(source) or _View("")
        if kind == "view":
            current[source] = _View(before.attempt, int(event["epoch"]), int(event["step"]), len(event["seats"]))
        elif kind == "run_started":
            attempt = str(event.get("attempt") or "")
            if before.epoch:
                before.attempt = attempt
            else:  # a run without views
                current[source] = _View(attempt)
        elif kind == "step":
            current.setdefault(source, before)
        if kind in ("view", "step"):
            yield current[source], event


def _faults(spans: list[tuple[int, int]], size: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """What sorted spans leave out of [0, size), and what they take more than once."""
    missing, twice, reached = [], [], 0
    for start, end in spans:
        if start > reached:
            missing.append((reached, start))
        elif start < reached:
            twice.append((start, min(end, reached)))
        reached = max(reached, end)
    if reached < size:
        missing.append((reached, size))
    return missing, twice
