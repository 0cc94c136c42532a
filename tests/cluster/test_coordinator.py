"""The coordinator as a process: losses are seen quickly, and its own death costs no view."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from coordinator_process import TOKEN, Coordinator, coordinator, enter, members

from shoal.cluster.attendance import Attendance, Listener
from shoal.cluster.journal import Journal
from shoal.cluster.views import View
from shoal.errors import CoordinatorError, RunEnded
from shoal.wire.control import ControlClient, ask


def until(condition: Callable[[], Any], timeout_s: float = 10.0) -> float:
    """Wait for a condition. Returns how long it took."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < timeout_s, "it does not come about"
        time.sleep(0.002)
    return time.monotonic() - begun


@contextlib.contextmanager
def a_view_with_a_process(running: Coordinator) -> Iterator[tuple[list[Attendance], Any]]:
    """Two members here (seats 0 and 1) and one in a process of its own (seat 2), all in view 1."""
    with members(running, 2) as here:
        process = running.spawn_member("far")
        try:
            enter(*here, epoch=1)
            until(lambda: running.status()["state"] == "running")
            yield here, process
        finally:
            process.kill()
            process.wait()


def next_view(attendance: Attendance, after: int, timeout_s: float = 10.0) -> View:
    view = attendance.next_view(after, timeout_s)
    assert view is not None, f"no view after {after}"
    return view


def test_a_killed_member_makes_a_view_within_a_moment(tmp_path: Path) -> None:
    with coordinator(tmp_path) as running, a_view_with_a_process(running) as (here, process):
        begun = time.monotonic()
        process.kill()
        view = next_view(here[0], 1)
        took_s = time.monotonic() - begun
        print(f"kill -9 to the next view: {took_s * 1e3:.1f} ms")
        assert (view.epoch, view.seats, view.planned) == (2, (0, 1), False)
        assert view.cause == "seat 2 on node-far: its connection broke"
        assert next_view(here[1], 1) == view
        assert took_s < 0.3


def test_a_stopped_member_is_lost_after_its_lease_and_may_come_back(tmp_path: Path) -> None:
    with coordinator(tmp_path) as running, a_view_with_a_process(running) as (here, process):
        begun = time.monotonic()
        process.send_signal(signal.SIGSTOP)
        view = next_view(here[0], 1)
        took_s = time.monotonic() - begun
        print(f"SIGSTOP to the next view: {took_s:.3f} s, with a lease of 1 s")
        assert view.seats == (0, 1)
        assert view.cause.startswith("seat 2 on node-far: silent for 1.")
        assert took_s < 1.5
        enter(*here, epoch=2)
        process.send_signal(signal.SIGCONT)
        view = next_view(here[0], 2)
        assert (view.epoch, view.seats, view.planned) == (3, (0, 1, 2), True)
        enter(*here, epoch=3)
        until(lambda: running.status()["state"] == "running")


def test_a_killed_coordinator_comes_back_without_a_new_view(tmp_path: Path) -> None:
    with coordinator(tmp_path) as running, a_view_with_a_process(running) as (here, _):
        running.kill()
        until(lambda: here[0].lost_contact_s > 0)
        here[0].progress(1, 17)
        time.sleep(0.5)
        begun = time.monotonic()
        running.start()
        listening_s = time.monotonic() - begun
        until(lambda: running.status()["state"] == "running")
        took_s = time.monotonic() - begun
        print(f"restart to running again: {took_s:.3f} s, of which {listening_s:.3f} s until it listened")
        assert took_s < 2.0
        assert here[0].lost_contact_s == 0
        time.sleep(1.5)
        assert here[0].latest is not None
        assert here[0].latest.epoch == running.status()["epoch"] == 1
        assert running.status()["members"][0]["step"] == 17


def test_who_dies_with_the_coordinator_is_missed_after_a_lease(tmp_path: Path) -> None:
    with coordinator(tmp_path) as running, a_view_with_a_process(running) as (here, process):
        running.kill()
        process.kill()
        running.start()
        view = next_view(here[0], 1)
        assert view.cause == "seat 2 on node-far: did not come back after the coordinator restarted"


def test_a_stopped_coordinator_blames_nobody(tmp_path: Path) -> None:
    with coordinator(tmp_path) as running, a_view_with_a_process(running) as (here, _):
        running.process.send_signal(signal.SIGSTOP)
        time.sleep(2.5)
        running.process.send_signal(signal.SIGCONT)
        assert here[0].next_view(1, 1.5) is None
        assert running.status()["epoch"] == 1


def test_a_decision_reaches_the_members_within_milliseconds(tmp_path: Path) -> None:
    times: list[float] = []
    with coordinator(tmp_path) as running, members(running, 3) as here:
        enter(*here, epoch=1)
        for epoch in range(1, 21):
            begun = time.monotonic()
            for member in here:
                member.broken(epoch, "connection reset")
            enter(*here, epoch=epoch + 1)
            times.append(time.monotonic() - begun)
    times.sort()
    print(f"broken by all to a new view at all: median {times[10] * 1e3:.1f} ms, worst {times[-1] * 1e3:.1f} ms")
    assert times[10] < 0.1


def test_a_view_is_handed_over_as_soon_as_it_comes(tmp_path: Path) -> None:
    seen: list[tuple[int, str]] = []

    class Noting(Listener):
        def on_view(self, view: View) -> None:
            seen.append((view.epoch, threading.current_thread().name))

    with coordinator(tmp_path, expected=1) as running, running.attend("a", listener=Noting()) as member:
        enter(member, epoch=1)
        with running.attend("b") as other:
            next_view(other, 0)
            until(lambda: len(seen) == 2)
    assert seen[:2] == [(1, "shoal-attendance"), (2, "shoal-attendance")]


def test_what_is_said_last_is_delivered(tmp_path: Path) -> None:
    with coordinator(tmp_path) as running, members(running, 3) as here:
        enter(*here, epoch=1)
        here[1].failed("no space left on device")
        here[1].close()
        with pytest.raises(RunEnded, match="seat 1 on node-m1 failed: no space left on device") as told:
            here[0].next_view(1, 10)
        assert told.value.failed
        assert here[0].ended == str(told.value)
        with running.attend("late") as late, pytest.raises(RunEnded):
            late.wait_welcome(10)


def test_what_is_said_while_the_coordinator_is_away_arrives_later(tmp_path: Path) -> None:
    with coordinator(tmp_path) as running, members(running, 3) as here:
        enter(*here, epoch=1)
        until(lambda: running.status()["state"] == "running")
        running.kill()
        here[0].leaving()
        here[1].broken(1, "connection reset")
        running.start()
        until(lambda: running.status()["state"] == "broken")
        until(lambda: [member["leaving"] for member in running.status()["members"]] == [True, False, False])


def test_the_run_ends_when_all_have_finished(tmp_path: Path) -> None:
    with coordinator(tmp_path) as running, members(running, 3) as here:
        enter(*here, epoch=1)
        for member in here:
            member.finished("100 steps")
        for member in here:
            with pytest.raises(RunEnded, match="100 steps") as told:
                member.next_view(1, 10)
            assert not told.value.failed


def test_a_launcher_reports_an_end(tmp_path: Path) -> None:
    with coordinator(tmp_path) as running, members(running, 3) as here:
        enter(*here, epoch=1)
        ask(running.address, {"ask": "ended", "seat": 1, "how": "killed by SIGKILL"}, token=TOKEN)
        assert next_view(here[0], 1).cause == "seat 1 on node-m1: killed by SIGKILL"
        with pytest.raises(CoordinatorError, match="expected one of them"):
            ask(running.address, {"ask": "ended", "how": "?"}, token=TOKEN)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"token": "wrong"}, "the token is not this run's"),
        ({"fingerprint": {"plan": "xyz", "job": "charlm"}}, "its plan is xyz, the other members' is abc"),
        ({"run": "other"}, "this coordinator is run r's, and not other's"),
        ({"seat": 0}, "seat 0 is held by a member on node-m0, which is alive"),
    ],
)
def test_who_may_not_come_in_is_told_why(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    with coordinator(tmp_path) as running, members(running, 1), running.attend("bad", **changes) as bad:
        with pytest.raises(CoordinatorError, match=told) as error:
            bad.wait_welcome(10)
        assert error.value.refused
        with pytest.raises(CoordinatorError, match=told):
            bad.next_view(0, 10)
        until(
            lambda: (
                not any(thread.name == "shoal-attendance" and thread is bad._thread for thread in threading.enumerate())
            )
        )


def test_questions_need_the_token_too(tmp_path: Path) -> None:
    with coordinator(tmp_path) as running:
        with pytest.raises(CoordinatorError, match="token"):
            ask(running.address, {"ask": "status"}, token="wrong")
        with pytest.raises(CoordinatorError, match="expected 'status', 'ended' or 'stop'"):
            ask(running.address, {"ask": "weather"}, token=TOKEN)


def test_nonsense_ends_its_connection_only(tmp_path: Path) -> None:
    with coordinator(tmp_path) as running, members(running, 1) as here:
        for nonsense in ({"kind": "beat", "epoch": 1, "step": 1}, {"kind": "hello", "member": 5}, {}):
            with contextlib.closing(ControlClient(running.address, token=TOKEN)) as client:
                assert [document["kind"] for document in client.attend(iter([nonsense]))] == ["refused"]
        assert here[0].lost_contact_s == 0
        assert [member["member"] for member in running.status()["waiting"]] == ["m0"]


def test_an_absent_coordinator_is_waited_for(tmp_path: Path) -> None:
    del tmp_path
    nowhere = Coordinator(Path(), {"lease_s": 1.0}, address="127.0.0.1:1")
    with nowhere.attend("a") as member:
        with pytest.raises(CoordinatorError, match=r"127\.0\.0\.1:1 did not let us in within 0 s"):
            member.wait_welcome(0.3)
        assert member.next_view(0, 0.1) is None
        assert member.lost_contact_s > 0.3


def test_two_coordinators_cannot_have_one_log_or_one_port(tmp_path: Path) -> None:
    with coordinator(tmp_path) as running:
        second = running.spawn()
        assert second.wait(20) == 1  # and not `communicate`, which would end it by closing its input
        assert b"another coordinator is at work on" in second.communicate()[1]
        (tmp_path / "other").mkdir()
        second = Coordinator(tmp_path / "other", running.rules, address=running.address).spawn()
        assert second.wait(20) == 1
        assert b"cannot listen at" in second.communicate()[1]


def test_the_coordinator_ends_with_its_launcher(tmp_path: Path) -> None:
    with coordinator(tmp_path) as running:
        running.process.stdin.close()
        assert running.process.wait(5) == 0
        running.process.stdin = None


def test_a_member_may_fork_while_it_attends(tmp_path: Path) -> None:
    """As a data loader does."""
    with coordinator(tmp_path, expected=1) as running, running.attend("a") as member:
        enter(member, epoch=1)
        for _ in range(5):
            child = multiprocessing.get_context("fork").Process(target=os.getpid)
            child.start()
            child.join(10)
            assert child.exitcode == 0
        with running.attend("b") as other:
            next_view(other, 0)
            assert next_view(member, 1).seats == (0, 1)


def test_a_torn_last_line_is_forgotten_and_any_other_damage_is_told(tmp_path: Path) -> None:
    path = tmp_path / "log"
    journal = Journal(path)
    journal.append([{"kind": "a"}, {"kind": "b"}])
    journal.close()
    with path.open("ab") as file:
        file.write(b'{"kind":"c"')
    journal = Journal(path)
    assert journal.records == [{"kind": "a"}, {"kind": "b"}]
    journal.append([{"kind": "d"}])
    journal.close()
    assert [json.loads(line)["kind"] for line in path.read_text().splitlines()] == ["a", "b", "d"]
    path.write_bytes(b'{"kind"\n{"kind":"b"}\n')
    with pytest.raises(CoordinatorError, match=":1: the coordinator's log is damaged"):
        Journal(path)


def test_a_launchers_stop_reaches_every_member(tmp_path: Path) -> None:
    heard: list[str] = []

    class Noting(Listener):
        def on_stop(self) -> None:
            heard.append("stop")

    with coordinator(tmp_path) as running, members(running, 3, listener=Noting()) as here:
        enter(*here, epoch=1)
        assert ask(running.address, {"ask": "stop"}, token=TOKEN) == {}
        until(lambda: heard == ["stop"] * 3)
        assert running.status()["state"] == "running", "whether it stops, and when, is the members' to agree on"


def test_with_a_certificate_only_who_trusts_it_talks(tmp_path: Path) -> None:
    for name in ("server", "stranger"):
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        command += ["-keyout", f"{tmp_path / name}.key", "-out", f"{tmp_path / name}.pem", "-days", "2"]
        command += ["-subj", "/CN=coordinator", "-addext", "subjectAltName=IP:127.0.0.1"]
        subprocess.run(command, check=True, capture_output=True)
    extra = {"certificate": str(tmp_path / "server.pem"), "key": str(tmp_path / "server.key")}
    with coordinator(tmp_path, extra, expected=1) as running:
        with running.attend("a", authority=tmp_path / "server.pem") as member:
            assert next_view(member, 0).epoch == 1
        with running.attend("b", authority=tmp_path / "stranger.pem") as member, pytest.raises(CoordinatorError):
            member.wait_welcome(0.5)
        with running.attend("c") as member, pytest.raises(CoordinatorError):
            member.wait_welcome(0.5)


def test_importing_it_brings_neither_torch_nor_grpc() -> None:
    modules = ("membership", "coordinator", "attendance", "journal")
    code = "; ".join(f"import shoal.cluster.{module}" for module in modules)
    code += "; import sys; print(sorted({'torch', 'grpc'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
