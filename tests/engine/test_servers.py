"""Parameter servers held against plain PyTorch, and against the loss of one of them."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from replicas import BATCH, SEED, STEPS, Replica, plan_text, samples_of
from torch import Tensor

from shoal.data.order import shuffled
from shoal.engine import random_state
from shoal.errors import WorkerFailedError
from shoal.job.target import resolve
from shoal.ops import WORLD
from shoal.strategy.sync.parameter_server import ParameterServerConfig, ParameterServerSync
from shoal.strategy.topology import Topology
from training_runs import events_of, final_state, final_tensors, train_on

TARGET = str(Path(__file__).parents[1] / "jobs" / "reference.py") + ":job"
SGD = ["optimizer=sgd"]


def test_workers_agree_among_themselves_over_one_lane() -> None:
    sync = ParameterServerSync(ParameterServerConfig(), None, Topology(0, ("a", "b")))
    assert (sync.num_lanes("cpu"), sync.groups) == (1, {WORLD})


def reference(shares: tuple[float, ...], steps: int = STEPS) -> dict[str, Tensor]:
    """Gradients clipped by each worker, weighted by its samples, summed; no step on what has none."""
    replicas = [Replica(rank) for rank in range(len(shares))]
    job = resolve(TARGET, SGD).load()
    optimizer = job.optimizer(replicas[0].parameters)
    schedule = job.schedule(optimizer)
    for step in range(steps):
        samples = samples_of(step, shares)
        for replica, mine in zip(replicas, samples, strict=True):
            replica.gradient(mine, len(mine) / sum(map(len, samples)))
        for together in zip(*(r.parameters for r in replicas), strict=True):
            present = [p.grad for p in together if p.grad is not None]
            together[0].grad = torch.stack(present).sum(dim=0) if present else None
        optimizer.step()
        schedule.step()
        for together in zip(*(r.parameters for r in replicas), strict=True):
            for p in together[1:]:
                p.data.copy_(together[0].detach())
    return replicas[0].model.state_dict()


@pytest.mark.parametrize(("servers", "shares"), [(1, (1.0, 2.0)), (2, (1.0, 1.0, 2.0))])
def test_bsp_is_synchronous_training(servers: int, shares: tuple[float, ...], tmp_path: Path) -> None:
    plan = plan_text(f'kind = "parameter_server"\nmode = "bsp"\nservers = {servers}', batch=f"shares = {list(shares)}")
    run = train_on([f"n{r}" for r in range(len(shares))], TARGET, plan, tmp_path / "run", settings=SGD)
    trained = final_state(run)["model"]
    for key, value in reference(shares).items():
        assert (trained[key] - value).norm() / value.norm() < 1e-10, key


@pytest.mark.parametrize("mode", ["bsp", "ssp"])
def test_a_run_that_was_resumed_ends_where_the_whole_one_does(mode: str, tmp_path: Path) -> None:
    plan = plan_text(f'kind = "parameter_server"\nmode = "{mode}"\nstaleness = 0')
    whole = train_on(["a", "b"], TARGET, plan, tmp_path / "whole", settings=SGD)
    cut = train_on(["a", "b"], TARGET, plan, tmp_path / "cut", settings=SGD)
    for path in cut.checkpoints.glob("step-*"):
        if path.name != "step-00000005":
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
    resumed = train_on(["a", "b"], TARGET, plan, tmp_path / "cut", settings=SGD, resume=True)
    assert events_of(resumed, "resumed")[0]["step"] == 5
    one, other = final_tensors(whole), final_tensors(resumed)
    for key, value in one.items():  # ssp applies updates in the order in which they come
        torch.testing.assert_close(
            other[key], value, rtol=1e-9 if mode == "bsp" else 1e-2, atol=1e-9 if mode == "bsp" else 1e-3
        )


def test_training_goes_on_when_a_server_is_killed(tmp_path: Path) -> None:
    plan = plan_text('kind = "parameter_server"\nmode = "bsp"\nservers = 2', steps=300)
    killed: list[int] = []

    def kill() -> None:
        events = tmp_path / "run" / "events" / "rank-0.jsonl"
        while not events.exists() or '"step":40,' not in events.read_text():
            time.sleep(0.02)
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            if "shoal.engine.server" in line and str(tmp_path / "run") in line and line[-1] == "1":
                process.kill()
                killed.append(process.pid)

    assassin = threading.Thread(target=kill, daemon=True)
    assassin.start()
    run = train_on(["a", "b"], TARGET, plan, tmp_path / "run", settings=SGD)
    assert killed
    assert [event["steps"] for event in events_of(run, "run_finished")] == [300]
    trained = final_state(run)["model"]
    for key, value in reference((1.0, 1.0), 300).items():
        assert (trained[key] - value).norm() / value.norm() < 1e-9, key


def test_keys_that_are_not_there_are_told_in_one_sentence(tmp_path: Path) -> None:
    plan = plan_text(f'kind = "parameter_server"\nsecrets = "{tmp_path / "nothing.toml"}"')
    with pytest.raises(WorkerFailedError, match=r"nothing\.toml"):
        train_on(["a"], TARGET, plan, tmp_path / "run", settings=SGD)


CLICKS = str(Path(__file__).parents[1] / "jobs" / "clicks.py") + ":job"


def test_a_sparse_table_on_servers_learns_what_it_learns_in_one_process(tmp_path: Path) -> None:
    plan = plan_text('kind = "parameter_server"\nmode = "bsp"\nservers = 2', steps=20).replace("clip_norm = 0.5", "")
    run = train_on(["a", "b"], CLICKS, plan, tmp_path / "run")
    random_state.seed_all(SEED, 0)
    job = resolve(CLICKS).load()
    data, model = job.data(), job.model()
    optimizer = job.optimizer(list(model.parameters()))
    for step in range(20):
        epoch, place = divmod(step, 60 // BATCH)
        order = shuffled(np.arange(60), 60, seed=SEED, epoch=epoch)
        optimizer.zero_grad()
        job.loss(model, data[torch.from_numpy(order[place * BATCH : (place + 1) * BATCH])]).backward()
        optimizer.step()
        model.items.step()
    trained = final_state(run)["model"]
    torch.testing.assert_close(trained["last.weight"], model.last.weight.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(trained["last.bias"], model.last.bias.detach(), rtol=1e-10, atol=1e-12)


def test_a_sparse_table_without_servers_and_an_id_out_of_range_are_told(tmp_path: Path) -> None:
    with pytest.raises(WorkerFailedError, match=r"set sync\.kind to parameter_server"):
        train_on(["a"], CLICKS, plan_text("kind = 'allreduce'"), tmp_path / "one")
    with pytest.raises(WorkerFailedError, match=r"SparseTable\(1000, 8\)"):
        train_on(["a"], CLICKS, plan_text('kind = "parameter_server"'), tmp_path / "two", settings=["rows=1000"])
