"""Workers of parameter servers come and go, and servers are lost: no sample is, and bsp stays plain training."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from elastic_runs import batches, chapters, events, faults, plan
from replicas import NUM_SAMPLES, SEED
from seen_runs import SEEN, twice_after_a_loss
from torch import Tensor

from command_line import train, training
from shoal.data.order import shuffled
from shoal.engine import random_state
from shoal.job.target import resolve
from shoal.run import Run
from training_runs import final_state

JOBS = Path(__file__).parents[1] / "jobs"
REFERENCE = f"{JOBS / 'reference.py'}:job"


def single_process(steps: int) -> dict[str, Tensor]:
    """Plain PyTorch: whole batches in one process."""
    job = resolve(REFERENCE, [f"num_samples={NUM_SAMPLES}", "optimizer=sgd"]).load()
    random_state.seed_all(SEED, 0)
    data, model = job.data(), job.model()
    optimizer = job.optimizer([p for p in model.parameters() if p.requires_grad])
    schedule = job.schedule(optimizer)
    for epoch, first, size in islice(batches(), steps):
        order = shuffled(np.arange(NUM_SAMPLES), NUM_SAMPLES, seed=SEED, epoch=epoch)
        optimizer.zero_grad()
        job.loss(model, data[torch.tensor(order[first : first + size])]).backward()
        optimizer.step()
        schedule.step()
    return dict(model.named_parameters())


def assert_each_part_once(run: Run, steps: int) -> None:
    """The shares of each step, brought by workers and in their names, make up its batch."""
    shares: Counter[int] = Counter()
    for event in [*events(run, "step"), *events(run, "step_in_name")]:
        shares[event["step"]] += event["share"]
    for step, (_, _, size) in enumerate(islice(batches(), steps), start=1):
        assert shares[step] >= size, f"samples of step {step} are missing"


def test_bsp_through_losses_and_an_arrival_is_plain_pytorch(tmp_path: Path) -> None:
    given = [
        *plan(tmp_path, 'kind = "parameter_server"\nmode = "bsp"\nservers = 2', clips=False),
        *faults(
            tmp_path,
            'kind = "join"\nstep = 5',
            'kind = "kill"\nrank = 2\nstep = 20',
            'kind = "kill"\nrank = 0\nstep = 50',
            'kind = "freeze"\nrank = 1\nstep = 200\nseconds = 4.0',
        ),
        *("--nodes", "4", "--steps", "400", "--set", "optimizer=sgd", "--set", "nap_s=0.03"),
    ]
    ended = train(REFERENCE, tmp_path / "run", *given)
    assert ended.code == 0, ended.stderr
    run = Run(tmp_path / "run")
    sizes = [len(chapter.seats) for chapter in chapters(run)]
    assert {2, 3, 4} <= set(sizes)
    trained = final_state(run)["model"]
    for name, parameter in single_process(400).items():
        assert torch.allclose(trained[name], parameter.detach(), rtol=1e-9, atol=1e-11), name
    assert_each_part_once(run, 400)


@pytest.mark.slow
def test_ssp_goes_on_without_a_lost_worker(tmp_path: Path) -> None:
    given = [
        *plan(tmp_path, 'kind = "parameter_server"\nmode = "ssp"\nstaleness = 2\nservers = 2', clips=False),
        *faults(tmp_path, 'kind = "kill"\nrank = 1\nstep = 40', 'kind = "join"\nstep = 5'),
        *("--nodes", "3", "--steps", "300", "--set", "optimizer=sgd", "--set", "nap_s=0.03"),
    ]
    ended = train(REFERENCE, tmp_path / "run", *given)
    assert ended.code == 0, ended.stderr
    run = Run(tmp_path / "run")
    assert [len(chapter.seats) for chapter in chapters(run)][-1] == 3
    assert_each_part_once(run, 300)
    assert max(event["clock"] - event["applied"] for event in events(run, "read")) <= 2


@pytest.mark.parametrize("victim", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_async_goes_on_without_a_lost_worker_and_leases_again_what_the_servers_do_not_have(
    victim: int, tmp_path: Path
) -> None:
    """Rank 0 holds the counter of the leases."""
    twice = twice_after_a_loss(tmp_path, 'kind = "parameter_server"\nmode = "async"\nservers = 2', victim)
    assert twice <= 6, "that is one part, and one that had not arrived whole"


@pytest.mark.slow
def test_a_server_and_then_a_worker_are_lost_and_training_goes_on(tmp_path: Path) -> None:
    (tmp_path / "seen").mkdir()
    given = [
        *plan(tmp_path, 'kind = "parameter_server"\nmode = "async"\nservers = 2'),
        *("--set", f"seen={tmp_path / 'seen'}", "--set", "num_samples=480", "--set", "nap_s=0.03"),
        *("--nodes", "3", "--steps", "320"),
    ]
    with training(SEEN, tmp_path / "run", *given) as handle:
        handle.wait_for_step(20)
        [server] = [p for p in handle.launcher.children() if p.cmdline()[-2:] == [str(handle.run.path), "0"]]
        server.kill()
        handle.wait_for(lambda event: event["kind"] == "server_lost")
        handle.wait_for_step(100)
        handle.workers()[1].kill()
        ended = handle.wait()
    assert ended.code == 0, ended.stderr
    [last] = [chapter for chapter in chapters(handle.run) if chapter.seats == [0, 2]]
    assert last.planned is False
    view = [event for event in events(handle.run, "view") if event["epoch"] == last.epoch]
    assert max(event["state_s"] + event["build_s"] for event in view) < 3, "nobody waits for the dead server again"
    assert final_state(handle.run)["progress"]["samples"] == 3840


@pytest.mark.slow
def test_killed_all_at_once_the_servers_go_on_from_a_checkpoint_with_their_optimizers(tmp_path: Path) -> None:
    sync = 'kind = "parameter_server"\nmode = "bsp"\nservers = 2'
    given = [*plan(tmp_path, sync, more="[checkpoint]\nevery = 7"), "--nodes", "2"]
    assert train(REFERENCE, tmp_path / "whole", *given, "--steps", "40").code == 0
    with training(REFERENCE, tmp_path / "killed", *given, "--steps", "40", "--set", "nap_s=0.02") as handle:
        handle.wait_for_step(17)
        handle.kill_everything()
    resumed = [*given, "--steps", "40", "--set", "nap_s=0.02", "--resume"]
    ended = train(REFERENCE, tmp_path / "killed", *resumed)
    assert ended.code == 0, ended.stderr
    whole, killed = final_state(Run(tmp_path / "whole"))["model"], final_state(Run(tmp_path / "killed"))["model"]
    for name, value in whole.items():
        assert torch.allclose(killed[name], value, rtol=1e-9, atol=1e-11), name
