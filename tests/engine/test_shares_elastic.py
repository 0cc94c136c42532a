"""Shares follow speeds while workers come and go: what is known of those who stay is kept, newcomers get their part."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_shares import BATCH, CLIP_NORM, NUM_SAMPLES, SEED, TARGET, single_process

from command_line import train
from shoal.events import Event, read_events
from shoal.run import Run
from training_runs import final_state


def given(folder: Path, *, faults: str = "", elastic: str = "", nodes: int = 3, steps: int = 100) -> list[str]:
    plan, rehearsal = folder / "plan.toml", folder / "faults.toml"
    plan.write_text(
        f"""
        seed = {SEED}
        [batch]
        size = {BATCH}
        balance = true
        [compute]
        device = "cpu"
        clip_norm = {CLIP_NORM}
        [validation]
        every = 0
        [checkpoint]
        every = "auto"
        [elastic]
        min_nodes = 1
        {elastic}
        """
    )
    rehearsal.write_text(faults)
    options = ["--plan", str(plan), "--nodes", str(nodes), "--steps", str(steps), "--set", f"num_samples={NUM_SAMPLES}"]
    return [*options, "--faults", str(rehearsal)] if faults else options


def events(run: Run, kind: str, seat: int | None = None) -> list[Event]:
    told = [event for event in read_events(run.events) if event["kind"] == kind]
    return [event for event in told if seat is None or event["source"] == f"rank-{seat}"]


def assert_as_plain_pytorch(run: Run, steps: int) -> None:
    parameters, losses = single_process(steps)
    told = {event["step"]: event["loss"] for event in events(run, "step")}
    assert [told[step] for step in range(1, steps + 1)] == pytest.approx(losses, rel=1e-9)
    trained = final_state(run)["model"]
    for name, value in parameters.items():
        assert (trained[name] - value).norm() <= 1e-9 * value.norm(), name


def test_those_who_stay_keep_their_shares_and_a_newcomer_gets_its_own(tmp_path: Path) -> None:
    """Seat 1 is slow; seat 2 dies; seat 3 joins."""
    rehearsal = '[[fault]]\nkind = "kill"\nrank = 2\nstep = 50\n[[fault]]\nkind = "join"\nstep = 75\n'
    options = given(tmp_path, faults=rehearsal, steps=400)
    ended = train(TARGET, tmp_path / "run", *options, "--set", "slow_rank=1", "--set", "nap_s=0.004")
    assert ended.code == 0, ended.stderr
    run = Run(tmp_path / "run")
    assert_as_plain_pytorch(run, 400)
    slow = events(run, "step", 1)
    shares = {event["step"]: event["share"] for event in slow if event["samples"] == BATCH}
    assert shares[1] == 8
    assert shares[49] <= 4
    second = next(event for event in events(run, "view", 1) if not event["planned"] and event["epoch"] > 1)
    first = min(step for step in shares if step > second["step"])
    assert shares[first] <= 8, "of two, after what was known: else it would have 12"
    newcomer = [event["share"] for event in events(run, "step", 3) if event["samples"] == BATCH]
    assert newcomer[0] == 0
    assert newcomer[-1] >= 8
    assert events(run, "interval")


def test_one_that_stays_far_too_slow_leaves_by_itself(tmp_path: Path) -> None:
    options = given(tmp_path, elastic="leave_out_slower_than = 2.0", steps=120)
    ended = train(TARGET, tmp_path / "run", *options, "--set", "slow_rank=1", "--set", "nap_s=0.004")
    assert ended.code == 0, ended.stderr
    run = Run(tmp_path / "run")
    assert_as_plain_pytorch(run, 120)
    told = [event for event in events(run, "slow") if event["persistent"]]
    assert [(event["rank"], event["cause"]) for event in told][:1] == [(1, "computing")]
    assert events(run, "left", 1)
    assert events(run, "step")[-1]["step"] == 120
    assert {event["cause"] for event in events(run, "view")} >= {"seat 1 leaves"}
