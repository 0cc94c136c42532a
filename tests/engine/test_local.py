"""Local steps held against plain PyTorch: as many models in one process as there are ranks, averaged by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from replicas import fragments_of
from torch import Tensor, nn
from torch.optim import SGD

from shoal.data.order import shuffled
from shoal.data.partition import spans
from shoal.engine import random_state
from shoal.job.target import resolve
from shoal.strategy.sync.local import LocalSync, least_every
from training_runs import events_of, final_state, final_tensors, train_on

STEPS, BATCH, NUM_SAMPLES, CLIP_NORM, SEED = 14, 12, 50, 0.5, 5
TARGET = str(Path(__file__).parents[1] / "jobs" / "reference.py") + ":job"


@dataclass(frozen=True)
class Setup:
    """One way to train locally. `offset` of fragment f is (f + 1) * every // fragments."""

    nodes: str = "ab"
    every: int = 4
    fragments: int = 1
    overlap: int = 0
    outer_lr: float = 1.0
    outer_momentum: float = 0.0
    merge: str = "carry"
    shares: tuple[float, ...] | None = None

    def plan(self, codec: str = "none", steps: int = STEPS) -> str:
        shares = f"shares = {list(self.shares)}" if self.shares else ""
        return f"""
            seed = {SEED}
            [sync]
            kind = "local"
            every = {self.every}
            fragments = {self.fragments}
            overlap = {self.overlap}
            outer_lr = {self.outer_lr}
            outer_momentum = {self.outer_momentum}
            merge = "{self.merge}"
            bucket_mb = 0.0003
            [codec]
            kind = "{codec}"
            [batch]
            size = {BATCH}
            {shares}
            [compute]
            device = "cpu"
            clip_norm = {CLIP_NORM}
            [checkpoint]
            every = 5
            keep = 9
            [stop]
            steps = {steps}
        """


SETUPS = {
    "local SGD": Setup(),
    "local SGD, uneven shares, one node": Setup(nodes="aaa", shares=(3, 1, 2)),
    "DiLoCo": Setup(nodes="abb", outer_lr=0.7, outer_momentum=0.9),
    "streaming, carry": Setup(nodes="abc", every=5, fragments=3, overlap=2),
    "streaming, mix": Setup(every=4, fragments=2, overlap=2, outer_lr=0.7, outer_momentum=0.9, merge="mix"),
    "a fragment that is merged when it leaves again": Setup(every=3, fragments=2, overlap=3, shares=(1, 2)),
}


class Replica:
    """One rank of the reference."""

    def __init__(self, rank: int) -> None:
        self.job = resolve(TARGET, [f"num_samples={NUM_SAMPLES}"]).load()
        random_state.seed_all(SEED, 0)
        self.data, self.model = self.job.data(), self.job.model()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = self.job.optimizer(self.parameters)
        self.schedule = self.job.schedule(self.optimizer)
        self.rank = rank

    def step(self, samples: list[int]) -> None:
        self.optimizer.zero_grad()
        if samples:
            self.job.loss(self.model, self.data[torch.tensor(samples)]).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP_NORM)
        self.optimizer.step()
        self.schedule.step()


def reference(setup: Setup, steps: int = STEPS) -> dict[str, Tensor]:
    """The final average of all replicas."""
    replicas = [Replica(rank) for rank in range(len(setup.nodes))]
    shares = setup.shares or (1.0,) * len(replicas)
    anchor = [p.detach().clone().requires_grad_() for p in replicas[0].parameters]
    outer = [SGD([p], setup.outer_lr, momentum=setup.outer_momentum, nesterov=setup.outer_momentum > 0) for p in anchor]
    members = fragments_of(tuple(p.numel() * 8 for p in anchor), setup.fragments)
    counts = [[0.0] * len(replicas) for _ in members]
    flying: dict[int, tuple[list[list[Tensor]], list[Tensor]]] = {}

    def leave(fragment: int) -> None:
        sent = [[r.parameters[i].detach().clone() for i in members[fragment]] for r in replicas]
        weights = [count / max(sum(counts[fragment]), 1) for count in counts[fragment]]
        means = [
            sum(w * (anchor[i].detach() - values[k]) for w, values in zip(weights, sent, strict=True))
            for k, i in enumerate(members[fragment])
        ]
        counts[fragment] = [0.0] * len(replicas)
        flying[fragment] = (sent, means)

    def merge(fragment: int) -> None:
        sent, means = flying.pop(fragment)
        for k, i in enumerate(members[fragment]):
            anchor[i].grad = means[k]
            outer[i].step()
            for replica, values in zip(replicas, sent, strict=True):
                now = replica.parameters[i].data
                if setup.overlap == 0:
                    now.copy_(anchor[i].detach())
                elif setup.merge == "carry":
                    now.copy_(anchor[i].detach() + (now - values[k]))
                else:
                    now.copy_((now + anchor[i].detach()) / 2)

    for step in range(1, steps + 1):
        epoch, place = divmod(step - 1, -(-NUM_SAMPLES // BATCH))
        order = shuffled(np.arange(NUM_SAMPLES), NUM_SAMPLES, seed=SEED, epoch=epoch)
        chosen = order[place * BATCH : (place + 1) * BATCH]
        for replica, span in zip(replicas, spans(len(chosen), shares), strict=True):
            replica.step([int(i) for i in chosen[span.start : span.stop]])
            for count in counts:
                count[replica.rank] += len(span)
        due = [(f + 1) * setup.every // setup.fragments for f in range(setup.fragments)]
        merging = [
            f for f, d in enumerate(due) if step > setup.overlap and (step - setup.overlap - d) % setup.every == 0
        ]
        leaving = [f for f, d in enumerate(due) if (step - d) % setup.every == 0]
        actions: list[Callable[[], None]] = [lambda f=f: merge(f) for f in merging]
        sending: list[Callable[[], None]] = [lambda f=f: leave(f) for f in leaving]
        for act in [*actions, *sending] if setup.overlap else [*sending, *actions]:
            act()
    for fragment in list(flying):
        merge(fragment)
    for fragment in range(len(members)):
        leave(fragment)
        _, means = flying.pop(fragment)
        for k, i in enumerate(members[fragment]):
            anchor[i].data.sub_(means[k])
    final = copy.deepcopy(replicas[0].model)
    for p, value in zip((p for p in final.parameters() if p.requires_grad), anchor, strict=True):
        p.data.copy_(value.detach())
    return final.state_dict()


@pytest.mark.parametrize("name", SETUPS)
def test_local_steps_give_what_many_models_averaged_by_hand_give(name: str, tmp_path: Path) -> None:
    setup = SETUPS[name]
    run = train_on(list(setup.nodes), TARGET, setup.plan(), tmp_path / "run")
    trained = final_state(run)["model"]
    for key, value in reference(setup).items():
        difference = (trained[key] - value).norm() / value.norm()
        assert difference < 1e-10, (key, difference)


def test_with_one_local_step_it_is_parameter_averaging(tmp_path: Path) -> None:
    setup = Setup(every=1, outer_lr=1.0, outer_momentum=0.0)
    replicas = [Replica(rank) for rank in range(2)]
    for step in range(STEPS):
        epoch, place = divmod(step, -(-NUM_SAMPLES // BATCH))
        order = shuffled(np.arange(NUM_SAMPLES), NUM_SAMPLES, seed=SEED, epoch=epoch)
        chosen = order[place * BATCH : (place + 1) * BATCH]
        for replica, span in zip(replicas, spans(len(chosen), (1.0, 1.0)), strict=True):
            replica.step([int(i) for i in chosen[span.start : span.stop]])
        average([replica.model for replica in replicas])
    trained = final_state(train_on(["a", "b"], TARGET, setup.plan(), tmp_path / "run"))["model"]
    for key, value in replicas[0].model.state_dict().items():
        assert (trained[key] - value).norm() / value.norm() < 1e-10, key


def average(models: list[nn.Module]) -> None:
    with torch.no_grad():
        for together in zip(*(model.parameters() for model in models), strict=True):
            mean = torch.stack(list(together)).mean(dim=0)
            for p in together:
                p.copy_(mean)


@pytest.mark.parametrize("codec", [pytest.param("none", marks=pytest.mark.slow), "bf16"])
def test_a_run_that_was_resumed_ends_with_the_same_bits(codec: str, tmp_path: Path) -> None:
    setup = SETUPS["streaming, carry"]
    whole = train_on(list(setup.nodes), TARGET, setup.plan(codec), tmp_path / "whole")
    cut = train_on(list(setup.nodes), TARGET, setup.plan(codec), tmp_path / "cut")
    for path in cut.checkpoints.glob("step-*"):
        if path.name != "step-00000005":
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
    resumed = train_on(list(setup.nodes), TARGET, setup.plan(codec), tmp_path / "cut", resume=True)
    assert events_of(resumed, "resumed")[0]["step"] == 5
    one, other = final_tensors(whole), final_tensors(resumed)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_auto_settles_a_rhythm_and_says_so(tmp_path: Path) -> None:
    plan = Setup().plan(steps=30).replace("every = 4", 'every = "auto"').replace("fragments = 1", 'fragments = "auto"')
    plan = plan.replace("overlap = 0", 'overlap = "auto"')
    run = train_on(["a", "b"], TARGET, plan, tmp_path / "run")
    [rhythm] = events_of(run, "rhythm")
    assert rhythm["fragments"] == 4
    assert rhythm["every"] >= 4, "at most one fragment leaves in a step"
    assert rhythm["overlap"] == rhythm["every"] // 4


def test_the_chosen_rhythm_leaves_the_links_half_of_the_time() -> None:
    assert least_every(1.0, 0.125, 4) == 16
    assert least_every(0.0, 0.125, 4) == 4
    assert least_every(1e9, 0.125, 4) == 512


def test_the_sync_of_this_page_is_the_one_in_the_table() -> None:
    assert LocalSync.__doc__
