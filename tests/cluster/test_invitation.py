"""What lets a worker in is for the run's owner only, and who cannot come in is told why."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from coordinator_process import TOKEN, coordinator

from shoal.cluster.invitation import Invitation, read_invitation, status_of_run, withdraw_invitation, write_invitation
from shoal.errors import CoordinatorError, RunEnded, RunError
from shoal.run import Run

INVITATION = Invitation(run="r", address="127.0.0.1:1", token=TOKEN, tls=False, resume=False)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "run")
    run.coordinator.mkdir(parents=True, mode=0o700)
    run.write_info({"id": "r"})
    return run


@contextlib.contextmanager
def a_port_where_nobody_answers() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        yield taken.getsockname()[1]


def test_it_is_read_as_it_was_written_and_only_its_owner_can(run: Run) -> None:
    write_invitation(run, INVITATION)
    assert read_invitation(run) == INVITATION
    [file] = run.coordinator.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert TOKEN not in repr(INVITATION)


def test_without_a_launcher_nobody_is_invited(run: Run) -> None:
    with pytest.raises(RunError, match=r"nobody trains .*run now: the run is over, or has not begun"):
        read_invitation(run)
    write_invitation(run, INVITATION)
    withdraw_invitation(run)
    withdraw_invitation(run)
    with pytest.raises(RunError, match="nobody trains"):
        read_invitation(run)


def test_an_earlier_attempts_invitation_does_not_count(run: Run) -> None:
    write_invitation(run, replace(INVITATION, run="the attempt before"))
    with pytest.raises(RunError, match="nobody trains"):
        read_invitation(run)


@pytest.mark.parametrize("text", ["{", "[]", '{"run": "r"}', '{"run": "r", "address": 3}'])
def test_a_damaged_one_is_named(run: Run, text: str) -> None:
    (run.coordinator / "invitation.json").write_text(text)
    with pytest.raises((RunError, CoordinatorError), match=r"damaged|not an invitation"):
        read_invitation(run)


def test_a_run_that_was_killed_is_told_by_its_address(run: Run) -> None:
    with a_port_where_nobody_answers() as port, pytest.raises(CoordinatorError) as caught:
        status_of_run(run, replace(INVITATION, address=f"127.0.0.1:{port}"))
    assert re.search(rf"cannot reach the coordinator at 127.0.0.1:{port}: .* killed .*--resume", str(caught.value))


def test_another_runs_coordinator_at_the_same_address_is_not_joined(run: Run, tmp_path: Path) -> None:
    with coordinator(tmp_path) as running:
        invitation = replace(INVITATION, address=running.address)
        assert status_of_run(run, invitation)["state"] == "forming"
        with pytest.raises(CoordinatorError, match="is another run's now"):
            status_of_run(run, replace(invitation, token="an older one"))


def test_a_run_that_is_over_is_not_joined(run: Run, tmp_path: Path) -> None:
    with coordinator(tmp_path, expected=1) as running, running.attend("a") as member:
        view = member.next_view(0, 10)
        assert view is not None
        member.entered(view.epoch)
        member.failed("it hurts")
        with pytest.raises(RunEnded):
            member.next_view(view.epoch, 10)
        with pytest.raises(RunError, match="is over: seat 0 on node-a failed: it hurts"):
            status_of_run(run, replace(INVITATION, address=running.address))
