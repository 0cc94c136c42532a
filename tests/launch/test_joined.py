"""A launcher stays as long as its coordinator knows a member, and not for one that nobody can tell of."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from shoal.cluster.seats import Seats
from shoal.errors import CoordinatorError
from shoal.launch import joined
from shoal.launch.joined import Joined
from shoal.run import Run


@dataclass
class FakeCoordinator:
    """Answers what it is told to; None: it is not there."""

    status: dict[str, Any] | None = None
    asked: list[str] = field(default_factory=list)

    def ask(self, question: str, *, timeout_s: float) -> dict[str, Any]:
        self.asked.append(question)
        if self.status is None:
            raise CoordinatorError("cannot reach the coordinator")
        return self.status


@dataclass
class Scene:
    """`clock`: the seconds that the launcher sees."""

    launcher: Joined
    coordinator: FakeCoordinator
    seats: Seats
    clock: list[float]

    def remain(self, after_s: float = 1.0, *, stop: bool = False) -> bool:
        self.clock[0] += after_s
        return self.launcher.remain(stop=stop)


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    run, clock, coordinator = Run(tmp_path), [1000.0], FakeCoordinator()
    run.write_info({"id": "r"})
    monkeypatch.setattr(joined.time, "monotonic", lambda: clock[0])
    seats = Seats(run)
    seats.take()
    launcher = Joined(seats, coordinator, patience_s=5.0)  # type: ignore[arg-type]
    return Scene(launcher, coordinator, Seats(run), clock)


def status(state: str, *seats: int) -> dict[str, Any]:
    return {"state": state, "members": [{"seat": seat} for seat in seats], "waiting": []}


def test_without_others_nobody_is_asked(scene: Scene) -> None:
    assert not scene.remain()
    assert scene.coordinator.asked == []


def test_it_stays_while_there_are_members_or_some_who_wait(scene: Scene) -> None:
    assert scene.seats.take() == 1
    scene.coordinator.status = status("running", 1)
    assert scene.remain()
    scene.coordinator.status = status("short") | {"waiting": [{"seat": 1}]}
    assert scene.remain()
    scene.coordinator.status = status("running")
    assert not scene.remain()


def test_after_the_end_it_waits_for_the_last_words_and_not_for_ever(scene: Scene) -> None:
    scene.seats.take()
    scene.coordinator.status = status("finishing", 1)
    assert scene.remain(600.0)
    scene.coordinator.status = status("ended", 1)
    assert scene.remain(4.0)
    assert not scene.remain(2.0)


def test_a_coordinator_that_is_being_started_again_is_waited_for(scene: Scene) -> None:
    scene.seats.take()
    assert scene.remain()
    assert scene.remain(29.0)
    scene.coordinator.status = status("recovering", 1)
    assert scene.remain()
    scene.coordinator.status = None
    assert scene.remain()
    assert scene.remain(29.0)
    assert not scene.remain(2.0), "it lives, and cannot be reached from here"


def test_a_stop_is_told_once(scene: Scene) -> None:
    scene.seats.take()
    assert scene.remain(stop=True)
    scene.coordinator.status = status("running", 1)
    for _ in range(3):
        assert scene.remain(stop=True)
    assert scene.coordinator.asked.count("stop") == 2, "the first was not heard"
