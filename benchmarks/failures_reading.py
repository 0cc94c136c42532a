"""Reads from event logs what a failure cost: pure functions from events to figures.

A *view* is a time in which the same ranks train together; whoever writes `view` and `step` events as Shoal's ranks do
is read alike. A step counts as committed once the first rank has written it, so one that nearly all had computed when
a rank was killed may still be committed after that; what is measured is the first step of the next view.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from shoal.events import Event

BEFORE = 20
"""Steps before a fault whose median is the normal step."""


@dataclass(frozen=True, kw_only=True)
class Interruption:
    """What a fault cost those whom it did not strike; seconds from the fault on.

    Attributes:
        normal_s: the median step before.
        noticed_s: until the first of them knew.
        resumed_s: until the first committed step without the struck one.
        lost_steps: committed steps that had to be taken again.
        survivors: members of the next view.
    """

    normal_s: float
    noticed_s: float
    resumed_s: float
    lost_steps: int
    survivors: int

    @property
    def beyond_s(self) -> float:
        """What it took beyond the normal step."""
        return self.resumed_s - self.normal_s


@dataclass(frozen=True, kw_only=True)
class Joining:
    """What a newcomer cost the others.

    Attributes:
        held_s: of each old member, from the end of its last step in the old view to the start of its first in the new.
        all_held_s: from the end of the last step of whoever was last with it to when all had begun the next. Members
            that share a core end a step one after the other; `held_s` has their waiting for each other in it.
        connect_s, state_s, build_s: of each old member, what its `view` event says of that.
        before_s, starting_s, during_s, after_s: steps before the newcomer was started, while it started, while it
            caught up, and with its help.
        caught_up_s: from the new view to the newcomer having the state.
        steps_followed: steps that the newcomer took at once.
    """

    held_s: list[float]
    all_held_s: float
    connect_s: list[float]
    state_s: list[float]
    build_s: list[float]
    before_s: list[float]
    starting_s: list[float]
    during_s: list[float]
    after_s: list[float]
    caught_up_s: float
    steps_followed: int

    @property
    def excess_s(self) -> float:
        """What all steps of the catching up took beyond as many normal steps of before."""
        return sum(self.during_s) - len(self.during_s) * statistics.median(self.before_s)


@dataclass(frozen=True, kw_only=True)
class Absence:
    """A time without a coordinator. `longest_s`: between two steps in that time and one step around it."""

    normal_s: float
    longest_s: float
    found_s: list[float]
    lost_steps: int
    views: int


def fault_of(events: Iterable[Event], kind: str) -> Event:
    """The first fault of a kind.

    Raises:
        SystemExit: it never happened.
    """
    found = next((e for e in events if e["kind"] == "fault_injected" and e["fault"] == kind), None)
    if found is None:
        raise SystemExit(f"the {kind} never happened: the run was too short")
    return found


def commits(events: Iterable[Event]) -> list[tuple[float, int]]:
    """When each step was committed for the first time, in order of time."""
    first: dict[int, float] = {}
    for event in _of_ranks(events, "step"):
        first.setdefault(event["step"], event["t"])
    return sorted((t, step) for step, t in first.items())


def intervals(events: Iterable[Event], begin: float, end: float) -> list[float]:
    """Seconds between committed steps, of those that ended between two moments."""
    return [after - before for (before, _), (after, _) in pairwise(commits(events)) if begin <= after <= end]


def normal_step(events: Sequence[Event], t: float) -> float:
    """The median of the last steps before `t`."""
    return statistics.median(intervals(events, 0.0, t)[-BEFORE:])


def interruption(events: Sequence[Event], t: float, struck: str) -> Interruption | None:
    """What a fault at `t` cost all but the source `struck`; None if they took no step after it."""
    survivors = [e for e in events if e["source"] != struck]
    old = max(e["epoch"] for e in _of_ranks(events, "view") if e["t"] <= t)
    views: dict[str, Event] = {}
    for view in _of_ranks(survivors, "view"):
        if view["t"] > t and view["epoch"] > old:
            views.setdefault(view["source"], view)
    resumed = [
        e["t"] for e in _of_ranks(survivors, "step") if e["source"] in views and e["t"] > views[e["source"]]["t"]
    ]
    if not resumed:
        return None
    noticed = [e["t"] for e in _of_ranks(survivors, "view_lost") if e["t"] > t] + [v["t"] for v in views.values()]
    following = min(views.values(), key=lambda view: (view["epoch"], view["t"]))
    return Interruption(
        normal_s=normal_step(events, t),
        noticed_s=min(noticed) - t,
        resumed_s=min(resumed) - t,
        lost_steps=max(0, _committed_in(events, old) - following["step"]),
        survivors=len(following["seats"]),
    )


def returned_s(events: Sequence[Event], t: float, struck: str) -> float | None:
    """Seconds from `t` until the struck rank trains again; None if it never does."""
    views = [e["t"] for e in _of_ranks(events, "view") if e["source"] == struck and e["t"] > t]
    steps = [e["t"] for e in _of_ranks(events, "step") if views and e["source"] == struck and e["t"] > views[0]]
    return steps[0] - t if steps else None


def joining(events: Sequence[Event]) -> Joining:
    """What the first newcomer cost.

    Raises:
        SystemExit: nobody joined, or the run ended before it had caught up.
    """
    started = fault_of(events, "join")["t"]
    taken = next((e for e in _of_ranks(events, "view") if e["t"] > started and e["took_state"]), None)
    caught_up = next((e for e in _of_ranks(events, "caught_up") if e["t"] > started), None)
    if taken is None or caught_up is None:
        raise SystemExit("the newcomer was not there before the run ended: give more steps")
    views = [e for e in _of_ranks(events, "view") if e["epoch"] == taken["epoch"] and not e["took_state"]]
    held, ends, starts = [], [], []
    for view in views:
        steps = [e for e in _of_ranks(events, "step") if e["source"] == view["source"]]
        last = [e for e in steps if e["t"] <= view["t"]][-1]
        first = next(e for e in steps if e["t"] > view["t"])
        ends.append(last["t"])
        starts.append(first["t"] - first["step_s"])
        held.append(starts[-1] - ends[-1])
    turned = min(view["t"] for view in views)
    return Joining(
        held_s=held,
        all_held_s=max(starts) - max(ends),
        connect_s=[view["connect_s"] for view in views],
        state_s=[view["state_s"] for view in views],
        build_s=[view["build_s"] for view in views],
        before_s=intervals(events, 0.0, started)[-BEFORE:],
        starting_s=intervals(events, started, turned),
        during_s=intervals(events, turned, caught_up["t"]),
        after_s=intervals(events, caught_up["t"], float("inf"))[1:],
        caught_up_s=caught_up["t"] - turned,
        steps_followed=caught_up["steps"],
    )


def absence(events: Sequence[Event]) -> Absence:
    """What the coordinator's death cost."""
    t = fault_of(events, "kill_coordinator")["t"]
    found = [e["t"] for e in _of_ranks(events, "coordinator_found") if e["t"] > t]
    if not found:
        raise SystemExit("no member found the coordinator again before the run ended: give more steps")
    normal = normal_step(events, t)
    steps = [step for _, step in commits(events)]
    return Absence(
        normal_s=normal,
        longest_s=max(intervals(events, t, max(found) + 3 * normal)),
        found_s=[moment - t for moment in found],
        lost_steps=sum(after <= before for before, after in pairwise(steps)),
        views=len({e["epoch"] for e in _of_ranks(events, "view")}),
    )


def plain(figure: Any) -> dict[str, Any]:
    """What is stored of a figure."""
    derived = {name: getattr(figure, name) for name in ("beyond_s", "excess_s") if hasattr(figure, name)}
    return {**vars(figure), **derived}


def _of_ranks(events: Iterable[Event], kind: str) -> list[Event]:
    return [e for e in events if e["kind"] == kind and str(e["source"]).startswith("rank-")]


def _committed_in(events: Sequence[Event], epoch: int) -> int:
    """The furthest step that any rank committed in views up to `epoch`."""
    now: dict[str, int] = {}
    furthest = 0
    for event in events:
        if event["kind"] == "view":
            now[event["source"]] = event["epoch"]
        elif event["kind"] == "step" and now.get(event["source"], 0) <= epoch:
            furthest = max(furthest, event["step"])
    return furthest
