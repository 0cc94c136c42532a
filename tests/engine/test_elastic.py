"""Workers die, freeze, come and go, and the model that comes out is the one that plain PyTorch trains."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from allreduce_runs import (
    assert_as_plain_pytorch,
    assert_each_sample_once,
    assert_never_back,
    assert_nothing_runs,
    causes,
    committed,
    plan,
)
from elastic_runs import LEASE_S, events, faults
from replicas import TARGET

from command_line import Ended, train, training
from shoal.launch.lab.rights import availability
from shoal.run import Run
from training_runs import final_state, final_tensors

RANDOM, FAULTY = (f"{Path(__file__).parents[1] / 'jobs' / name}.py:job" for name in ("random", "faulty"))


@pytest.fixture(scope="module")
def storm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Ended]:
    """One run through every kind of loss: a worker killed, the coordinator killed, one frozen, the first one preempted,
    and one that joins."""
    folder = tmp_path_factory.mktemp("storm")
    given = [
        *plan(folder),
        *faults(
            folder,
            'kind = "join"\nstep = 5',
            'kind = "kill"\nrank = 2\nstep = 20',
            'kind = "kill_coordinator"\nstep = 60',
            'kind = "freeze"\nrank = 1\nstep = 150\nseconds = 4.0',
            'kind = "preempt"\nrank = 0\nstep = 260',
        ),
    ]
    ended = train(TARGET, folder / "run", *given, "--nodes", "4", "--steps", "400", "--set", "nap_s=0.05", "--json")
    return Run(folder / "run"), ended


def test_training_goes_on_to_its_end(storm: tuple[Run, Ended]) -> None:
    run, ended = storm
    assert ended.code == 0, ended.stderr
    assert ended.json["state"] == "finished"
    assert ended.json["steps"] == 400
    assert {event["fault"] for event in events(run, "fault_injected")} == {
        "join", "kill", "kill_coordinator", "freeze", "preempt"
    }  # fmt: skip
    assert_nothing_runs(run)


def test_the_model_is_the_one_that_plain_pytorch_trains(storm: tuple[Run, Ended]) -> None:
    assert_as_plain_pytorch(storm[0], 400)


def test_each_sample_is_used_once_an_epoch_and_the_log_proves_it(storm: tuple[Run, Ended]) -> None:
    assert_each_sample_once(storm[0])


def test_no_committed_step_is_lost(storm: tuple[Run, Ended]) -> None:
    assert_never_back(storm[0])


def test_every_view_says_why_it_is(storm: tuple[Run, Ended]) -> None:
    told = causes(storm[0])
    assert told[0] == "start"
    assert any(cause.startswith("seat 2 on local: its connection") or "closed" in cause for cause in told)
    assert "seat 1 on local: silent for 1.5 s" in told
    assert 4 in {seat for event in events(storm[0], "view") for seat in event["seats"]}
    assert "seat 0 leaves" in told
    assert told.count("seat 1 joins") == 1, "it thawed, and came back with the others' state"


def test_a_dead_coordinator_stops_nobody_and_changes_no_view(storm: tuple[Run, Ended]) -> None:
    run, _ = storm
    [killed] = [event for event in events(run, "fault_injected") if event["fault"] == "kill_coordinator"]
    [again] = [event for event in events(run, "coordinator_started") if event["t"] > killed["t"]]
    found = [e for e in events(run, "coordinator_found") if again["t"] - 0.1 < e["t"] < again["t"] + 5]
    assert len(found) >= 2
    meanwhile = [e for e in events(run, "step") if killed["t"] < e["t"] < again["t"]]
    assert meanwhile, "training stood still without its coordinator"
    assert not [e for e in events(run, "view") if killed["t"] < e["t"] < again["t"] + 1 and "lost" in e["cause"]]


def test_a_newcomer_catches_up_while_the_others_train(storm: tuple[Run, Ended]) -> None:
    run, _ = storm
    [joined] = [e for e in events(run, "view") if e["cause"] == "seat 1 joins" and e["source"] == "rank-1"]
    assert joined["planned"]
    assert joined["took_state"]
    [caught_up] = [e for e in events(run, "caught_up") if e["source"] == "rank-1" and e["t"] > joined["t"]]
    steps = [e for e in events(run, "step") if e["source"] == "rank-1" and e["t"] > joined["t"]]
    assert steps[0]["share"] == 0, "it has no state yet, so it trains on nothing"
    assert steps[-1]["share"] > 0
    assert caught_up["step"] >= steps[0]["step"]


def test_with_too_few_workers_training_waits_and_says_so(tmp_path: Path) -> None:
    """Of two workers, one dies and is started again: meanwhile the other keeps the state."""
    given = [*plan(tmp_path, elastic="restarts = 1"), *faults(tmp_path, 'kind = "kill"\nrank = 1\nstep = 20')]
    ended = train(TARGET, tmp_path / "run", *given, "--nodes", "2", "--steps", "60", "--set", "nap_s=0.02")
    run = Run(tmp_path / "run")
    assert ended.code == 0, ended.stderr
    assert any("1 are here, 2 are needed" in event["message"] for event in events(run, "waiting"))
    assert_as_plain_pytorch(run, 60)
    assert_never_back(run)


def test_killed_all_at_once_and_resumed_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    given = [*plan(tmp_path, more="[checkpoint]\nevery = 7"), "--nodes", "2"]
    assert train(RANDOM, tmp_path / "whole", *given, "--steps", "40").code == 0
    with training(RANDOM, tmp_path / "killed", *given, "--steps", "40", "--set", "nap_s=0.02") as handle:
        handle.wait_for_step(17)
        handle.kill_everything()
    resumed = [*given, "--steps", "40", "--set", "nap_s=0.02", "--resume"]
    ended = train(RANDOM, tmp_path / "killed", *resumed)
    assert ended.code == 0, ended.stderr
    whole, killed = Run(tmp_path / "whole"), Run(tmp_path / "killed")
    one, two = final_tensors(whole), final_tensors(killed)
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def test_a_fault_of_the_job_itself_ends_the_run_with_its_cause(tmp_path: Path) -> None:
    """Everybody would meet it in turn: to go on without the first would only end later."""
    given = [*plan(tmp_path), "--set", "fault=raise", "--nodes", "3", "--steps", "20"]
    ended = train(FAULTY, tmp_path / "run", *given)
    assert ended.code == 1
    assert "no such token: 'fish'" in ended.stderr
    assert ended.stderr.count("Traceback") == 1
    assert_nothing_runs(Run(tmp_path / "run"))


def test_a_rehearsal_that_is_impossible_here_is_refused_before_there_is_a_run(tmp_path: Path) -> None:
    given = [*plan(tmp_path), *faults(tmp_path, 'kind = "cut"\nrank = 1\nstep = 3\nseconds = 1.0')]
    ended = train(FAULTY, tmp_path / "run", *given, "--nodes", "3", "--steps", "5")
    assert ended.code != 0
    assert "cut works on a node's own link, which only the lab has: add --on lab" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "run").exists()


def test_a_worker_that_hangs_while_its_heartbeat_goes_on_ends_itself_and_the_others_go_on(tmp_path: Path) -> None:
    given = [*plan(tmp_path, elastic="stuck_after_s = 2.0"), "--set", "fault=hang", "--set", "nap_s=0.02"]
    ended = train(FAULTY, tmp_path / "run", *given, "--nodes", "3", "--steps", "40")
    assert ended.code == 0, ended.stderr
    run = Run(tmp_path / "run")
    assert sorted(committed(run)) == list(range(1, 41))
    [stuck] = events(run, "stuck")
    assert stuck["source"] == "rank-1"
    assert "forward took longer than elastic.stuck_after_s = 2" in stuck["message"]
    assert "go_wrong" in stuck["stack"], "it says where it stands"
    assert "go_wrong" in (run.logs / "rank-1.log").read_text()
    assert "seat 1 ended itself" in ended.stdout + ended.stderr
    assert_nothing_runs(run)


def test_a_worker_that_does_not_come_out_of_a_broken_view_ends_itself(tmp_path: Path) -> None:
    """It hangs in backward, which may well wait for others; but not any more once another one is lost."""
    given = [*plan(tmp_path, min_nodes=1, elastic="stuck_after_s = 2.0"), "--nodes", "3", "--steps", "40"]
    given += ["--set", "fault=hang in backward", "--set", "nap_s=0.02"]
    with training(FAULTY, tmp_path / "run", *given) as handle:
        handle.wait_for_step(1)
        time.sleep(1.0)  # by now it hangs, and the others wait for it
        before = max(committed(handle.run))
        handle.workers()[2].kill()
        ended = handle.wait()
    assert ended.code == 0, ended.stderr
    run = Run(tmp_path / "run")
    assert before < 40
    assert sorted(committed(run)) == list(range(1, 41))
    [stuck] = events(run, "stuck")
    assert stuck["source"] == "rank-1"
    assert "the way out of a broken view took longer than elastic.stuck_after_s = 2" in stuck["message"]
    assert_nothing_runs(run)


def test_ctrl_c_saves_and_ends_an_elastic_run(tmp_path: Path) -> None:
    given = [*plan(tmp_path), "--nodes", "2", "--set", "nap_s=0.01"]
    with training(TARGET, tmp_path / "run", *given) as handle:
        handle.wait_for_step(10)
        handle.interrupt()
        ended = handle.wait()
    assert ended.code == 0, ended.stderr
    run = Run(tmp_path / "run")
    steps = max(committed(run))
    assert final_state(run)["progress"]["step"] == steps
    assert {event["reason"] for event in events(run, "run_finished")} == {"interrupted"}
    assert_nothing_runs(run)


JUMPING_CLOCKS = """
import os, sys, time

def clock(real=time.time):
    return real() + (jump_s if os.path.exists(os.environ["JUMP"]) else 0.0)

if os.environ.get("RANK") == "1":
    jump_s, time.time = -3600.0, clock
elif "shoal.cluster.coordinator" in sys.orig_argv:
    jump_s, time.time = 7200.0, clock
"""


def test_clocks_that_jump_cost_nothing_and_are_named(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(JUMPING_CLOCKS)
    jump = tmp_path / "jump"
    env = {"PYTHONPATH": str(tmp_path), "JUMP": str(jump)}
    given = [*plan(tmp_path), "--nodes", "2", "--set", "nap_s=0.01"]
    with training(TARGET, tmp_path / "run", *given, env=env) as handle:
        handle.wait_for_step(10)
        jump.touch()
        handle.wait_for(lambda e: e["kind"] == "warning" and "the clock of rank-1 jumped by -3,600 s" in e["message"])
        time.sleep(2 * LEASE_S)  # whom the coordinator took for silent would be lost now
        before = max(committed(handle.run))
        handle.wait_for_step(before + 10)
        handle.interrupt()
        ended = handle.wait()
    assert ended.code == 0, ended.stderr
    run = Run(tmp_path / "run")
    assert {event["epoch"] for event in events(run, "view")} == {1}
    assert_as_plain_pytorch(run, max(committed(run)))


def test_ctrl_c_while_too_few_are_left_saves_the_last_committed_step(tmp_path: Path) -> None:
    given = [*plan(tmp_path, min_nodes=3), "--nodes", "3", "--set", "nap_s=0.01"]
    with training(TARGET, tmp_path / "run", *given) as handle:
        handle.wait_for_step(10)
        handle.workers()[1].kill()
        handle.wait_for(lambda event: event["kind"] == "waiting" and "2 are here, 3 are needed" in event["message"])
        handle.interrupt()
        ended = handle.wait()
    assert ended.code == 0, ended.stderr
    run = Run(tmp_path / "run")
    last = max(committed(run))
    assert final_state(run)["progress"]["step"] == last
    assert [event["reason"] for event in events(run, "run_finished")] == ["interrupted"] * 2
    assert len(events(run, "checkpoint_saved")) == 1, "one of the two has saved"
    resumed = ["--nodes", "3", "--set", "nap_s=0.01", "--resume", "--steps", str(last + 20)]
    more = train(TARGET, tmp_path / "run", *resumed)
    assert more.code == 0, more.stderr
    assert_as_plain_pytorch(run, last + 20)


def test_who_waits_for_a_place_and_is_told_to_go_leaves_the_run_to_the_others(tmp_path: Path) -> None:
    """It was a member once, and holds a state: an older one than theirs, which is in nobody's way."""
    given = [*plan(tmp_path, min_nodes=1, elastic="max_nodes = 2"), "--nodes", "2", "--set", "nap_s=0.02"]
    given += faults(tmp_path, 'kind = "join"\nstep = 10')
    with training(TARGET, tmp_path / "run", *given) as handle:
        handle.wait_for(lambda e: e["kind"] == "waiting" and e["source"] == "rank-2")
        member = handle.workers()[1]
        member.suspend()
        handle.wait_for(lambda e: e["kind"] == "view" and e["source"] == "rank-2")
        member.resume()
        handle.wait_for(lambda e: e["kind"] == "waiting" and e["source"] == "rank-1")
        member.send_signal(signal.SIGTERM)
        handle.wait_for(lambda e: e["kind"] == "left" and e["source"] == "rank-1")
        before = max(committed(handle.run))
        handle.wait_for_step(before + 20)
        handle.interrupt()
        ended = handle.wait()
    run = Run(tmp_path / "run")
    assert ended.code == 0, ended.stderr
    assert any(event["source"] == "rank-1" for event in events(run, "left"))
    assert {event["source"] for event in events(run, "run_finished")} == {"rank-0", "rank-2"}
    assert not [event for event in events(run, "checkpoint_saved") if event["source"] == "rank-1"]
    assert_as_plain_pytorch(run, max(committed(run)))


@pytest.mark.slow  # in CI, Ctrl-C in the same place stands for it
def test_who_waits_for_members_and_is_told_to_go_saves_before_and_ends_nobodys_run(tmp_path: Path) -> None:
    given = [*plan(tmp_path, min_nodes=3), "--nodes", "3", "--set", "nap_s=0.01"]
    with training(TARGET, tmp_path / "run", *given) as handle:
        handle.wait_for_step(10)
        workers = handle.workers()
        workers[1].kill()
        for seat in (0, 2):
            handle.wait_for(lambda e, source=f"rank-{seat}": e["kind"] == "waiting" and e["source"] == source)
            workers[seat].send_signal(signal.SIGTERM)
            handle.wait_for(lambda e, source=f"rank-{seat}": e["kind"] == "left" and e["source"] == source)
        ended = handle.wait()
    assert ended.code == 1, "nobody came to the end"
    run = Run(tmp_path / "run")
    last = max(committed(run))
    assert final_state(run)["progress"]["step"] == last
    assert not events(run, "run_finished")
    resumed = ["--nodes", "3", "--set", "nap_s=0.01", "--resume", "--steps", str(last + 20)]
    more = train(TARGET, tmp_path / "run", *resumed)
    assert more.code == 0, more.stderr
    assert_as_plain_pytorch(run, last + 20)


def test_a_worker_outside_a_launchers_reach_is_told_what_it_lacks(tmp_path: Path) -> None:
    given = [*plan(tmp_path), "--nodes", "2", "--set", "nap_s=0.02"]
    with training(TARGET, tmp_path / "run", *given) as handle:
        handle.wait_for_step(5)
        processes = list(handle.workers().values())
        environment: dict[str, Any] = processes[0].environ()
        seat = {"SHOAL_SEAT": "7", "SHOAL_TOKEN": "wrong", "SHOAL_CONTROL": ""}
        command = processes[0].cmdline()
        stranger = psutil.Popen(command, env={**environment, **seat})
        assert stranger.wait(timeout=60) == 1
        assert any("token" in event["message"] for event in events(handle.run, "error"))
        before = max(committed(handle.run))
        handle.wait_for_step(before + 5)
        processes[1].send_signal(signal.SIGTERM)


@pytest.mark.skipif(not all(needed.ok for needed in availability()[:3]), reason="the lab needs root and iproute2")
def test_over_a_network_a_cut_link_and_a_damaged_message_cost_no_step(tmp_path: Path) -> None:
    """Nodes with links of their own: one is cut off and comes back, one sends a message in which a byte is wrong."""
    given = [
        *plan(tmp_path, more="[sync]\nverify = true"),
        *faults(
            tmp_path,
            'kind = "flip_message"\nrank = 1\nstep = 30',
            'kind = "cut"\nnode = "node2"\nstep = 60\nseconds = 6.0',
            'kind = "flip_message"\nrank = 0\nstep = 200',
        ),
    ]
    lab = ["--on", "lab", "--lab", "nodes=4,link=100mbit"]
    ended = train(TARGET, tmp_path / "run", *given, *lab, "--steps", "250", "--set", "nap_s=0.05")
    run = Run(tmp_path / "run")
    assert ended.code == 0, ended.stderr
    assert_as_plain_pytorch(run, 250)
    assert_each_sample_once(run)
    assert_never_back(run)
    assert max(e["t"] for e in events(run, "step") if e["source"] == "rank-2") > events(run, "fault_ended")[0]["t"]
    damaged = [event["message"] for event in events(run, "view_lost") if "arrived damaged" in event["message"]]
    assert len(damaged) == 2, "each damaged message was caught once"
    assert any("seat 2 on node2: silent" in cause for cause in causes(run))
    assert "seat 2 joins" in causes(run), "it came back when its link did"
