"""Replicas that several workers hold together: one dies, and the model is still the one that plain PyTorch trains."""

from __future__ import annotations

import signal
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from elastic_runs import events, faults
from layout_runs import final_model, relative_difference
from replicas import BATCH, CLIP_NORM, NUM_SAMPLES, SEED
from torch import Tensor

from command_line import train, training
from shoal.dashboard.audit import audit
from shoal.data.order import shuffled
from shoal.engine import random_state
from shoal.events import read_events
from shoal.job.target import resolve
from shoal.run import Run

JOB = str(Path(__file__).parents[1] / "jobs" / "reference.py") + ":job"
LEASE_S = 1.5


def plan(folder: Path, layout: str, *, min_nodes: int = 2, checkpoint: str = "every = 0", more: str = "") -> list[str]:
    """The option that names a plan under which workers that share a replica may be lost."""
    path = folder / "plan.toml"
    path.write_text(
        f"""
        seed = {SEED}
        [layout]
        {layout}
        [batch]
        size = {BATCH}
        [compute]
        device = "cpu"
        clip_norm = {CLIP_NORM}
        [validation]
        every = 0
        [checkpoint]
        {checkpoint}
        [elastic]
        min_nodes = {min_nodes}
        lease_s = {LEASE_S}
        {more}
        """
    )
    return ["--plan", str(path)]


@cache
def single_process(steps: int) -> tuple[dict[str, Tensor], list[float]]:
    """The reference: whole batches in one process; (parameters, losses)."""
    job = resolve(JOB, []).load()
    random_state.seed_all(SEED, 0)
    data, model = job.data(), job.model()
    trainable = [p for p in model.parameters() if p.requires_grad]
    update = job.optimizer(trainable)
    schedule = job.schedule(update)
    losses = []
    for step in range(steps):
        epoch, place = divmod(step, -(-NUM_SAMPLES // BATCH))
        order = shuffled(np.arange(NUM_SAMPLES), NUM_SAMPLES, seed=SEED, epoch=epoch)
        update.zero_grad()
        loss = job.loss(model, data[torch.tensor(order[place * BATCH : (place + 1) * BATCH])])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, CLIP_NORM)
        update.step()
        schedule.step()
        losses.append(loss.item())
    return dict(model.named_parameters()), losses


def assert_as_plain_pytorch(run: Run, steps: int) -> None:
    """The losses of every step that counts, and the parameters at the end; and every sample was used once an epoch."""
    parameters, losses = single_process(steps)
    told = {event["step"]: event["loss"] for event in events(run, "step")}
    assert sorted(told) == list(range(1, steps + 1))
    assert [told[step] for step in sorted(told)] == pytest.approx(losses, rel=1e-9)
    trained = final_model(run)
    for name, parameter in parameters.items():
        assert relative_difference(trained[name], parameter.detach()) < 1e-9, name
    found = audit(read_events(run.events), NUM_SAMPLES)
    assert found.is_clean, found
    assert found.epochs >= 3


def shapes(run: Run) -> list[tuple[int, int, str]]:
    """(replicate, shard, where the state came from) of every view, in order."""
    told = {event["epoch"]: event for event in events(run, "view")}
    return [(e["replicate"], e["shard"], e["state_from"]) for _, e in sorted(told.items())]


def test_a_shard_that_dies_with_its_node_is_in_anothers_memory(tmp_path: Path) -> None:
    """Nothing is on disk; what is lost are the steps since the last copies, and they are taken again."""
    given = [
        *plan(tmp_path, "shard = 4", checkpoint="every = 0\nmemory_every = 8"),
        *faults(tmp_path, 'kind = "kill"\nrank = 2\nstep = 20'),
    ]
    ended = train(JOB, tmp_path / "run", *given, "--nodes", "4", "--steps", "40", "--set", "nap_s=0.01")
    run = Run(tmp_path / "run")
    assert ended.code == 0, ended.stderr
    assert shapes(run) == [(1, 4, "start"), (1, 3, "memory")]
    [back] = events(run, "rolled_back")
    assert back["state_from"] == "memory"
    assert 0 < back["from_step"] - back["step"] <= 8 + 8
    assert_as_plain_pytorch(run, 40)
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000040"]


def test_with_a_second_replica_no_step_is_lost_and_ranks_join_and_leave(tmp_path: Path) -> None:
    """Two replicas of two shards: what a killed rank had is alive elsewhere. Then one joins, and one leaves."""
    given = [
        *plan(tmp_path, "replicate = 2\nshard = 2"),
        *faults(tmp_path, 'kind = "kill"\nrank = 1\nstep = 15', 'kind = "join"\nstep = 20'),
    ]
    with training(JOB, tmp_path / "run", *given, "--nodes", "4", "--set", "nap_s=0.02") as handle:
        joined = handle.wait_for(lambda event: event["kind"] == "view" and event["cause"].endswith("joins"))
        handle.wait_for_step(joined["step"] + 3)
        handle.workers()[0].send_signal(signal.SIGTERM)
        left = handle.wait_for(lambda event: event["kind"] == "view" and event["cause"] == "seat 0 leaves")
        handle.wait_for(lambda event: event["kind"] == "step" and event["step"] == left["step"] + 5)
        handle.interrupt()
        ended = handle.wait()
    run = Run(tmp_path / "run")
    assert ended.code == 0, ended.stderr
    assert shapes(run) == [(2, 2, "start"), (1, 3, "live"), (2, 2, "live"), (1, 3, "live")]
    assert not events(run, "rolled_back")
    for source in {event["source"] for event in events(run, "step")}:
        steps = [event["step"] for event in events(run, "step") if event["source"] == source]
        assert steps == sorted(set(steps)), "a committed step was taken again"
    assert_as_plain_pytorch(run, max(event["step"] for event in events(run, "step")))


@pytest.mark.slow
def test_two_losses_after_each_other_are_two_ways_back(tmp_path: Path) -> None:
    """The copies that the first survivors make at once are what the second ones go on from."""
    given = [
        *plan(tmp_path, "shard = 4", checkpoint="every = 0\nmemory_every = 5"),
        *faults(tmp_path, 'kind = "kill"\nrank = 3\nstep = 20', 'kind = "kill"\nrank = 1\nstep = 33'),
    ]
    ended = train(JOB, tmp_path / "run", *given, "--nodes", "4", "--steps", "60", "--set", "nap_s=0.02")
    run = Run(tmp_path / "run")
    assert ended.code == 0, ended.stderr
    assert shapes(run) == [(1, 4, "start"), (1, 3, "memory"), (1, 2, "memory")]
    assert_as_plain_pytorch(run, 60)


@pytest.mark.slow
@pytest.mark.parametrize("every", [10, 0])
def test_two_neighbours_lost_at_once_go_back_to_the_disk_or_say_what_is_missing(every: int, tmp_path: Path) -> None:
    given = [*plan(tmp_path, "shard = 4", checkpoint=f"every = {every}\nmemory_every = 5")]
    options = [*given, "--nodes", "4", "--steps", "60", "--set", "nap_s=0.05"]
    with training(JOB, tmp_path / "run", *options) as handle:
        handle.wait_for_step(25)
        workers = handle.workers()
        lost = [workers[1], workers[2]]
        for worker in lost:
            worker.suspend()
        for worker in lost:
            worker.kill()
        ended = handle.wait()
    run = Run(tmp_path / "run")
    if not every:
        assert ended.code == 1
        assert any("is lost" in e["message"] and "no checkpoint on disk" in e["message"] for e in events(run, "error"))
        return
    assert ended.code == 0, ended.stderr
    assert shapes(run)[-1] == (1, 2, "disk")
    assert events(run, "rolled_back")[-1]["step"] in (10, 20)
    assert_as_plain_pytorch(run, 60)


@pytest.mark.slow
def test_down_to_one_and_up_again(tmp_path: Path) -> None:
    """One rank alone holds the whole model; when another comes, it is divided again."""
    checkpoint, more = "every = 0\nmemory_every = 5", "restarts = 1"
    given = plan(tmp_path, "shard = 2", min_nodes=1, checkpoint=checkpoint, more=more)
    with training(JOB, tmp_path / "run", *given, "--nodes", "2", "--set", "nap_s=0.02") as handle:
        together = handle.wait_for(lambda event: event["kind"] == "view" and event["shard"] == 2)
        handle.wait_for_step(together["step"] + 12)
        handle.workers()[1].kill()
        again = handle.wait_for(
            lambda event: event["kind"] == "view" and event["epoch"] > together["epoch"] and event["shard"] == 2
        )
        handle.wait_for_step(again["step"] + 5)
        handle.interrupt()
        ended = handle.wait()
    run = Run(tmp_path / "run")
    assert ended.code == 0, ended.stderr
    assert shapes(run)[-2:] == [(1, 1, "memory"), (1, 2, "live")]
    assert_as_plain_pytorch(run, max(event["step"] for event in events(run, "step")))
