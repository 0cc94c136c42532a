"""Every seat and every node's name is given once, whoever asks at the same moment."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shoal.cluster.seats import Seats
from shoal.run import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "run")
    run.path.mkdir()
    run.write_info({"id": "first"})
    return run


def test_askers_at_the_same_moment_have_neither_seat_nor_name_in_common(run: Run) -> None:
    together = threading.Barrier(8)

    def ask(_: int) -> tuple[list[int], str]:
        seats = Seats(run)
        together.wait()
        return [seats.take() for _ in range(5)], seats.take_node("clone")

    with ThreadPoolExecutor(8) as pool:
        given = list(pool.map(ask, range(8)))
    assert sorted(seat for seats, _ in given for seat in seats) == list(range(40)), "no gap, and none twice"
    assert {name for _, name in given} == {"clone"} | {f"clone-{number}" for number in range(2, 9)}


def test_a_launcher_knows_the_seats_that_others_took(run: Run) -> None:
    launcher, guest = Seats(run), Seats(run)
    assert [launcher.take(), launcher.take()] == [0, 1]
    assert launcher.others() == set()
    assert guest.take() == 2
    assert launcher.others() == {2}
    assert guest.others() == {0, 1}


def test_a_name_may_be_given_again_and_a_seat_may_not(run: Run) -> None:
    seats = Seats(run)
    assert (seats.take(), seats.take_node("gpu")) == (0, "gpu")
    seats.free_node("gpu")
    seats.free_node("gpu")
    assert (Seats(run).take(), Seats(run).take_node("gpu")) == (1, "gpu")


def test_another_attempt_at_the_run_begins_anew(run: Run) -> None:
    assert Seats(run).take() == 0
    run.write_info({"id": "second"})
    assert Seats(run).take() == 0


def test_only_the_owner_sees_who_is_in(run: Run) -> None:
    Seats(run).take()
    folders = [run.coordinator, *(path for path in run.coordinator.iterdir() if path.is_dir())]
    assert [folder.stat().st_mode & 0o777 for folder in folders] == [0o700, 0o700]
