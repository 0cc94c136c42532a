"""Machines join a run that goes on elsewhere and leave it again, and the model is the one that plain PyTorch trains."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from allreduce_runs import (
    assert_as_plain_pytorch,
    assert_each_sample_once,
    assert_nothing_runs,
    causes,
    committed,
    plan,
)
from elastic_runs import events
from replicas import NUM_SAMPLES, TARGET

from certificates import make_certificate
from command_line import Ended, Training, joining, train, training
from shoal.cli.main import main
from shoal.cluster.description import parse_lab
from shoal.cluster.invitation import Invitation, read_invitation, write_invitation
from shoal.dashboard.audit import audit
from shoal.dashboard.folding import fold
from shoal.events import read_events
from shoal.launch.lab import lab as labs
from shoal.launch.lab.rights import availability
from shoal.plan import dump_plan, parse_plan, resolve_plan
from shoal.run import Run, write_atomic
from training_runs import final_state

HAS_OPENSSL = shutil.which("openssl") is not None
HAS_LAB = all(needed.ok for needed in availability()[:3])


@dataclass(frozen=True)
class Machine:
    """Where a command runs: the words before it, and the address that others reach it at."""

    prefix: tuple[str, ...]
    address: str


@pytest.fixture(scope="module")
def machines() -> Iterator[tuple[Machine, Machine]]:
    """Two of the same host name with networks of their own; this one twice where that needs rights we lack."""
    if not HAS_LAB:
        yield Machine((), "127.0.0.1"), Machine((), "127.0.0.1")
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labs, "check", lambda network, nodes, groups: {})  # nobody asks how fast it is
        with labs.Lab(parse_lab("nodes=2")) as lab:
            seating = lab.seating()
            here, there = (placement.prefix for placement in seating.placements)
            yield Machine(here, seating.address), Machine(there, "")


@dataclass
class Story:
    """One run, and how each command ended."""

    run: Run
    train: Ended
    joins: dict[str, Ended] = field(default_factory=dict)
    orphans: list[psutil.Process] = field(default_factory=list)
    invitation: Invitation | None = None
    private: list[int] = field(default_factory=list)


def wait_until_it_trains(handle: Training, seat: int) -> None:
    handle.wait_for(lambda e: e["kind"] == "step" and e["source"] == f"rank-{seat}" and e["share"] > 0)


def wait_for_more(handle: Training, seat: int) -> None:
    """Some steps more of the worker that has the seat."""
    last = max(event["step"] for event in events(handle.run, "step"))
    handle.wait_for(lambda e: e["kind"] == "step" and e["source"] == f"rank-{seat}" and e["step"] > last + 5)


def kill_coordinator(handle: Training) -> None:
    """`kill -9`; wait until it is there again."""
    [process] = [p for p in handle.launcher.children() if "shoal.cluster.coordinator" in p.cmdline()]
    process.kill()
    killed_at = time.time()
    handle.wait_for(lambda e: e["kind"] == "coordinator_found" and e["source"] == "rank-6" and e["t"] > killed_at)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, machines: tuple[Machine, Machine]) -> Story:
    """Seats 0 and 1 begin. 2 joins and leaves; 3 joins and is killed; 4 has other code; 5 and 6 join; 0 and 1 leave.

    Then the coordinator is killed, and at last the launcher asked to stop.
    """
    folder, (here, there) = tmp_path_factory.mktemp("story"), machines
    run, code = folder / "run", folder / "reference.py"
    shutil.copy(TARGET.removesuffix(":job"), code)
    tls = ""
    if HAS_OPENSSL:
        make_certificate(folder / "c.pem", folder / "c.key", address=here.address)
        tls = f'tls_certificate = "{folder / "c.pem"}"\ntls_key = "{folder / "c.key"}"'
    given = [*plan(folder, min_nodes=1, elastic=tls), "--nodes", "2", "--set", "nap_s=0.02", "--address", here.address]
    told = Story(Run(run), Ended(-1, "", "", 0))
    with training(f"{code}:job", run, *given, "--json", prefix=here.prefix) as handle:
        handle.wait_for_step(5)
        told.invitation = read_invitation(told.run)
        told.private = [path.stat().st_mode & 0o077 for path in told.run.coordinator.glob("*.json")]
        with joining(run, "--json", prefix=there.prefix) as guest:
            wait_until_it_trains(handle, 2)
            guest.interrupt()
            told.joins["left"] = guest.wait()
        with joining(run, prefix=there.prefix) as guest:
            wait_until_it_trains(handle, 3)
            told.orphans = guest.kill_launcher()
        wait_for_more(handle, 0)
        code.write_text(code.read_text() + "\n# not what the others train\n")
        with joining(run, prefix=there.prefix) as guest:
            told.joins["refused"] = guest.wait()
        shutil.copy(TARGET.removesuffix(":job"), code)
        with joining(run, "--workers", "2", "--json", prefix=there.prefix) as guest:
            wait_until_it_trains(handle, 5)
            wait_until_it_trains(handle, 6)
            for process in handle.workers().values():
                process.send_signal(signal.SIGTERM)
            for seat in (0, 1):
                handle.wait_for(lambda e, seat=seat: e["kind"] == "worker_exited" and e["rank"] == seat)
            kill_coordinator(handle)
            wait_for_more(handle, 5)
            handle.interrupt()
            told.joins["stayed"] = guest.wait()
        told.train = handle.wait()
    return told


def test_a_run_whose_own_workers_have_left_is_ended_by_those_who_joined(story: Story) -> None:
    assert story.train.code == 0, story.train.stderr
    assert story.train.json["state"] == "finished"
    assert story.train.json["reason"] == "interrupted"
    finished = {event["source"] for event in events(story.run, "run_finished")}
    assert finished == {"rank-5", "rank-6"}
    stayed = story.joins["stayed"]
    assert stayed.code == 0, stayed.stderr
    ended = {worker["seat"]: worker["ended"] for worker in stayed.json["workers"]}
    assert ended == {5: "finished", 6: "finished"}
    assert f"training has ended after step {story.train.json['steps']} (interrupted)" in stayed.stderr


def test_who_joins_trains_and_ctrl_c_hands_over(story: Story) -> None:
    left = story.joins["left"]
    assert left.code == 0, left.stderr
    [worker] = left.json["workers"]
    assert (worker["seat"], worker["ended"]) == (2, "left")
    assert worker["step"] > 0
    for line in ("joined as seat 2", "seat 2 trains as one of 3", "leaving: the others", "seat 2 has left after step"):
        assert line in left.stderr
    told = causes(story.run)
    assert told[told.index("seat 2 joins") + 1] == "seat 2 leaves"


def test_the_model_is_the_one_that_plain_pytorch_trains(story: Story) -> None:
    assert_as_plain_pytorch(story.run, final_state(story.run)["progress"]["step"])


def test_each_sample_is_used_once_an_epoch_and_the_log_proves_it(story: Story) -> None:
    assert_each_sample_once(story.run)
    found = audit(read_events(story.run.events), NUM_SAMPLES)
    assert found.is_clean, found
    assert found.epochs > 1
    assert len(committed(story.run)) == final_state(story.run)["progress"]["step"]


def test_machines_of_one_host_name_are_two_nodes(story: Story) -> None:
    """Ranks of one node would share memory."""
    last = events(story.run, "view")[-1]
    nodes = {event["node"] for event in events(story.run, "run_started")}
    assert last["seats"] == [5, 6]
    assert last["nodes"][0] == last["nodes"][1] == story.joins["stayed"].json["node"]
    assert os.uname().nodename in nodes
    assert len(nodes) >= 2


def test_killing_shoal_join_leaves_no_process_and_costs_the_others_nothing(story: Story) -> None:
    assert story.orphans
    assert not psutil.wait_procs(story.orphans, timeout=10)[1]
    assert any(cause.startswith("seat 3 on") and "joins" not in cause for cause in causes(story.run))


def test_other_code_is_refused_by_name_and_the_run_does_not_mind(story: Story) -> None:
    refused = story.joins["refused"]
    assert refused.code == 1
    assert "seat 4: the coordinator refused us: its code is" in refused.stderr
    assert "Traceback" not in refused.stderr
    history = fold(read_events(story.run.events))
    assert history.failures == []
    assert any(note.message.startswith("rank 4 did not come in") for note in history.warnings)


def test_only_its_owner_could_have_joined_and_nobody_can_any_more(story: Story) -> None:
    assert story.run.coordinator.stat().st_mode & 0o777 == 0o700
    assert len(story.private) >= 2
    assert set(story.private) == {0}
    with joining(story.run.path) as guest:
        ended = guest.wait()
    assert ended.code == 2
    assert f"nobody trains {story.run.path} now: the run is over" in ended.stderr
    assert_nothing_runs(story.run)


@pytest.mark.skipif(not HAS_OPENSSL, reason="certificates are made with openssl")
def test_the_token_was_never_told_in_the_clear(story: Story) -> None:
    assert story.invitation is not None
    assert story.invitation.tls
    assert "can read the token" not in story.train.stderr


def made_run(folder: Path, elastic: str) -> Run:
    """A run directory as `shoal train` makes it."""
    run = Run(folder / "run")
    for path in (run.path, run.events, run.logs):
        path.mkdir()
    write_atomic(run.plan, dump_plan(resolve_plan(parse_plan(elastic, origin="the test's plan"), 2)).encode())
    run.write_info({"job": TARGET, "arguments": {}, "id": "r"})
    return run


def refusal(run: Run, *options: str, capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> tuple[int, str]:
    """The exit code of `shoal join` and the one line that it says."""
    patch.setattr("sys.argv", ["shoal", "join", str(run.path), *options])
    with pytest.raises(SystemExit) as caught:
        main()
    [line] = capsys.readouterr().err.strip().splitlines()
    assert isinstance(caught.value.code, int)
    return caught.value.code, line


def test_what_cannot_be_joined_says_why_and_takes_no_seat(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("fixed", "over", "killed"):
        (tmp_path / name).mkdir()
    fixed = made_run(tmp_path / "fixed", "")
    over, killed = (made_run(tmp_path / name, "[elastic]\nmin_nodes = 1") for name in ("over", "killed"))
    killed.coordinator.mkdir(mode=0o700)
    write_invitation(killed, Invitation(run="r", address="127.0.0.1:1", token="t", tls=False, resume=False))
    cases = [
        (Run(tmp_path / "nowhere"), (), 2, "is not a run directory"),
        (fixed, (), 2, "is not an elastic run, its workers are the same from beginning to end"),
        (over, (), 2, "the run is over, or has not begun"),
        (killed, (), 1, "cannot reach the coordinator at 127.0.0.1:1"),
        (killed, ("--address", "192.0.2.1"), 2, "--address got '192.0.2.1', which is no IPv4 address of this machine"),
        (killed, ("--workers", "0"), 2, "--workers got 0, expected at least 1"),
    ]
    for run, options, code, told in cases:
        got, line = refusal(run, *options, capsys=capsys, patch=monkeypatch)
        assert (got, told in line) == (code, True), line
    assert [path.name for path in killed.coordinator.iterdir()] == ["invitation.json"]
    assert list(killed.events.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "elastic", "told"),
    [
        (["--address", "192.0.2.1"], "", "--address got '192.0.2.1', which is no IPv4 address of this machine"),
        (["--address", "127.0.0.1", "--on", "lab"], "", "--address is for runs on real machines"),
        ([], 'tls_certificate = "no.pem"\ntls_key = "no.key"', "no.pem, which TLS needs: No such file"),
    ],
)
def test_what_nobody_could_join_is_refused_before_there_is_a_run(
    options: list[str],
    elastic: str,
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = [*plan(tmp_path, elastic=elastic), "--nodes", "2", *options]
    monkeypatch.setattr("sys.argv", ["shoal", "train", TARGET, "--run", str(tmp_path / "run"), *given])
    with pytest.raises(SystemExit):
        main()
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not HAS_OPENSSL, reason="certificates are made with openssl")
def test_a_certificate_for_another_address_is_told_before_any_worker_starts(tmp_path: Path) -> None:
    """Workers would ask for ever to be let in."""
    make_certificate(tmp_path / "c.pem", tmp_path / "c.key", address="192.0.2.1")
    tls = f'tls_certificate = "{tmp_path / "c.pem"}"\ntls_key = "{tmp_path / "c.key"}"'
    ended = train(TARGET, tmp_path / "run", *plan(tmp_path, elastic=tls), "--nodes", "2", "--steps", "1")
    assert ended.code == 1
    assert "subjectAltName = IP:127.0.0.1" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert [path.name for path in (tmp_path / "run" / "events").iterdir()] == ["launcher.jsonl"]


@pytest.mark.slow
def test_without_a_free_place_it_waits_and_says_so_and_comes_in_when_one_is(
    tmp_path: Path, machines: tuple[Machine, Machine]
) -> None:
    """In the clear, and asked to leave while it still waits: neither may end the run."""
    here, there = machines
    given = [*plan(tmp_path, min_nodes=1, elastic="max_nodes = 2"), "--nodes", "2", "--set", "nap_s=0.02"]
    run = tmp_path / "run"
    with training(TARGET, run, *given, "--address", here.address, "--json", prefix=here.prefix) as handle:
        handle.wait_for_step(5)
        with joining(run, "--json", prefix=there.prefix) as guest:
            handle.wait_for(lambda e: e["kind"] == "waiting" and e["source"] == "rank-2")
            guest.interrupt()
            ended = guest.wait()
        assert (ended.code, ended.json["workers"][0]["ended"]) == (0, "left"), ended.stderr
        assert "seat 2 waits: all 2 places are taken" in ended.stderr
        with joining(run, "--json", prefix=there.prefix) as guest:
            handle.wait_for(lambda e: e["kind"] == "waiting" and e["source"] == "rank-3")
            handle.workers()[1].send_signal(signal.SIGTERM)
            wait_until_it_trains(handle, 3)
            handle.interrupt()
            told = handle.wait()
            stayed = guest.wait()
    assert told.code == 0, told.stderr
    assert stayed.code == 0, stayed.stderr
    assert told.json["state"] == "finished"
    assert ("can read the token" in told.stderr) == HAS_LAB, "beyond loopback only"
    assert_as_plain_pytorch(Run(run), told.json["steps"])
    assert_each_sample_once(Run(run))


@pytest.mark.slow
def test_when_all_is_killed_but_the_guest_it_ends_by_itself_and_says_why(
    tmp_path: Path, machines: tuple[Machine, Machine]
) -> None:
    here, there = machines
    given = [*plan(tmp_path), "--nodes", "2", "--set", "nap_s=0.02", "--address", here.address]
    run = tmp_path / "run"
    with training(TARGET, run, *given, prefix=here.prefix) as handle:
        handle.wait_for_step(5)
        with joining(run, prefix=there.prefix) as guest:
            wait_until_it_trains(handle, 2)
            handle.kill_everything()
            ended = guest.wait()
        with joining(run, prefix=there.prefix) as guest:
            late = guest.wait()
    assert ended.code == 1
    assert "its coordinator has not answered for 60 s" in ended.stderr
    assert late.code == 1
    assert "cannot reach the coordinator at" in late.stderr
    assert "killed" in late.stderr
    assert_nothing_runs(Run(run))


@pytest.mark.slow
def test_ctrl_c_while_it_still_comes_in_stops_nobody_else(tmp_path: Path) -> None:
    """At whatever moment: who is no member yet only goes."""
    given = [*plan(tmp_path, min_nodes=1), "--nodes", "1", "--set", "nap_s=0.02", "--json"]
    run = tmp_path / "run"

    def has(seat: int, kind: str) -> Callable[[], bool]:
        return lambda: any(event["source"] == f"rank-{seat}" for event in events(Run(run), kind))

    moments = [lambda: bool(list(run.glob("coordinator/seats-*/seat-1"))), has(2, "coordinator_found"), has(3, "view")]
    with training(TARGET, run, *given) as handle:
        handle.wait_for_step(5)
        for moment in moments:
            with joining(run, "--json") as guest:
                while not moment():
                    assert guest.launcher.is_running()
                    time.sleep(0.001)
                guest.interrupt()
                ended = guest.wait()
            assert ended.code == 0, ended.stderr
            assert ended.json["workers"][0]["ended"] == "left"
            wait_for_more(handle, 0)
        handle.interrupt()
        told = handle.wait()
    assert told.code == 0, told.stderr
    assert_as_plain_pytorch(Run(run), told.json["steps"])
