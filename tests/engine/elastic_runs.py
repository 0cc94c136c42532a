"""What tests of workers that come and go have in common: plans, failures to rehearse, and reading the log of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from replicas import BATCH, CLIP_NORM, NUM_SAMPLES, SEED

from shoal.data.partition import spans
from shoal.events import Event, read_events
from shoal.run import Run

LEASE_S = 1.5


def plan(folder: Path, sync: str, *, min_nodes: int = 2, clips: bool = True, more: str = "") -> list[str]:
    """The option that names a plan under which workers may be lost."""
    path = folder / "plan.toml"
    path.write_text(
        f"""
        seed = {SEED}
        [sync]
        {sync}
        [batch]
        size = {BATCH}
        [compute]
        device = "cpu"
        {f"clip_norm = {CLIP_NORM}" if clips else ""}
        [elastic]
        min_nodes = {min_nodes}
        lease_s = {LEASE_S}
        {more}
        """
    )
    return ["--plan", str(path)]


def faults(folder: Path, *tables: str) -> list[str]:
    """The option that names failures to rehearse; each table is the inside of one."""
    path = folder / "faults.toml"
    path.write_text("".join(f"[[fault]]\n{table}\n" for table in tables))
    return ["--faults", str(path)]


def events(run: Run, kind: str) -> list[Event]:
    """All events of one kind, of every process, by time."""
    return [event for event in read_events(run.events) if event["kind"] == kind]


@dataclass
class Chapter:
    """One view as the log tells it.

    Attributes:
        start: steps committed when it began.
        done: seat -> steps committed when it ended there.
        took: the seats that came in and took another's state.
    """

    epoch: int
    seats: list[int]
    planned: bool
    start: int
    done: dict[int, int] = field(default_factory=dict)
    took: list[int] = field(default_factory=list)


def chapters(run: Run) -> list[Chapter]:
    """All views in order. Steps that a rank made up before it entered a view belong to none."""
    found: dict[int, Chapter] = {}
    for event in events(run, "view"):
        seat = int(str(event["source"]).removeprefix("rank-"))
        chapter = found.setdefault(
            event["epoch"], Chapter(event["epoch"], event["seats"], event["planned"], event["step"])
        )
        assert (chapter.seats, chapter.start) == (event["seats"], event["step"]), "members disagree about a view"
        chapter.done[seat] = event["step"]
        if event["took_state"]:
            chapter.took.append(seat)
    for seat, told in _by_seat(run).items():
        current, made_up = 0, _made_up(told)
        for event in told:
            if event["kind"] == "view":
                current = event["epoch"]
            elif event["kind"] == "step" and id(event) not in made_up:
                found[current].done[seat] = event["step"]
    return [found[epoch] for epoch in sorted(found)]


def positions_used(run: Run) -> Counter[tuple[int, int]]:
    """(epoch, position) -> how often living values learned from it: committed steps, without what was lost."""
    seats, lost = {chapter.epoch: chapter.seats for chapter in chapters(run)}, _lost(run)
    used: Counter[tuple[int, int]] = Counter()
    for seat, told in _by_seat(run).items():
        view, current = 0, list[int]()
        for event in told:
            if event["kind"] == "view":
                view, current = event["epoch"], seats[event["epoch"]]
            elif event["kind"] == "step" and not any(
                seat == gone and event["step"] >= first and view <= last_view for gone, first, last_view in lost
            ):
                span = spans(event["samples"], (1.0,) * len(current))[current.index(seat)]
                assert len(span) == event["share"]
                used.update((event["epoch"], event["first"] + place) for place in span)
    return used


def _lost(run: Run) -> list[tuple[int, int, int]]:
    """(seat, the first step that is lost, the view in which it was)."""
    views = events(run, "view")
    return [
        (
            event["seat"],
            event["first_step"],
            max(view["epoch"] for view in views if view["source"] == event["source"] and view["t"] <= event["t"]),
        )
        for event in events(run, "samples_lost")
    ]


def assert_every_sample_once_or_told_as_lost(run: Run, steps: int) -> None:
    expected = Counter(
        (epoch, first + place) for epoch, first, size in islice(batches(), steps) for place in range(size)
    )
    used, lost = positions_used(run), sum(event["samples"] for event in events(run, "samples_lost"))
    assert max(used.values()) == 1
    assert used.keys() <= expected.keys()
    assert len(expected) - len(used) == lost


def batches() -> Iterator[tuple[int, int, int]]:
    """(epoch, first position, samples) of every global batch, without end."""
    epoch = 0
    while True:
        for first in range(0, NUM_SAMPLES, BATCH):
            yield epoch, first, min(BATCH, NUM_SAMPLES - first)
        epoch += 1


def _by_seat(run: Run) -> dict[int, list[Event]]:
    told: dict[int, list[Event]] = {}
    for event in read_events(run.events):
        if event["kind"] in ("view", "step", "made_up"):
            told.setdefault(int(str(event["source"]).removeprefix("rank-")), []).append(event)
    return told


def _made_up(told: list[Event]) -> set[int]:
    """The identities of the step events that a rank took by itself between two views."""
    found: set[int] = set()
    for place, event in enumerate(told):
        if event["kind"] == "made_up":
            found.update(id(step) for step in told[place - event["steps"] : place])
    return found
