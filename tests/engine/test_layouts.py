"""Every layout trains as one process does: float64, against a plain PyTorch loop."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from layout_runs import final_model, relative_difference
from replicas import CLIP_NORM, SEED, TARGET
from torch import Tensor

from shoal.data.order import shuffled
from shoal.engine import random_state
from shoal.job.target import resolve
from training_runs import events_of, train_on

BATCH, STEPS, NUM_SAMPLES = 12, 10, 50
BLOCKS = str(Path(__file__).parents[1] / "jobs" / "blocks.py") + ":job"


def plan_text(layout: str, batch: str = "", sync: str = "") -> str:
    return f"""
        seed = {SEED}
        [layout]
        {layout}
        [sync]
        {sync}
        [batch]
        size = {BATCH}
        {batch}
        [compute]
        device = "cpu"
        clip_norm = {CLIP_NORM}
        [stop]
        steps = {STEPS}
    """


@cache
def single_process(target: str) -> tuple[dict[str, Tensor], list[float], float]:
    """The reference: whole batches, one process; returns (parameters, losses, the last validation loss or 0)."""
    job = resolve(target, []).load()
    random_state.seed_all(SEED, 0)
    data, model = job.data(), job.model()
    data, validation = data if isinstance(data, tuple) else (data, None)
    trainable = [p for p in model.parameters() if p.requires_grad]
    update = job.optimizer(trainable)
    schedule = job.schedule(update)
    losses = []
    for step in range(STEPS):
        epoch, place = divmod(step, -(-NUM_SAMPLES // BATCH))
        order = shuffled(np.arange(NUM_SAMPLES), NUM_SAMPLES, seed=SEED, epoch=epoch)
        chosen = order[place * BATCH : (place + 1) * BATCH]
        update.zero_grad()
        loss = first(job.loss(model, data[torch.from_numpy(chosen)]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, CLIP_NORM)
        update.step()
        schedule.step()
        losses.append(loss.item())
    with torch.no_grad():
        last = float(first(job.loss(model.eval(), validation[:]))) if validation is not None else 0.0
    return model.state_dict(), losses, last


def first(result: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def assert_trains_as_one_process(nodes: str, target: str, plan: str, folder: Path) -> None:
    run = train_on(list(nodes), target, plan, folder)
    expected, losses, validation = single_process(target)
    trained = final_model(run)
    assert expected.keys() - trained.keys() <= {"head.weight", "back.weight"}  # tied
    for name, value in trained.items():
        assert relative_difference(value, expected[name]) < 1e-9, name
    assert [event["loss"] for event in events_of(run, "step")] == pytest.approx(losses, rel=1e-9)
    if validation:
        assert events_of(run, "validation")[-1]["loss"] == pytest.approx(validation, rel=1e-9)


@pytest.mark.parametrize(
    ("nodes", "layout", "batch"),
    [
        ("aa", "shard = 2", ""),
        ("aaa", "shard = 3", "accumulate = 2"),
        ("aabb", "shard = 2", "shares = [3, 1, 2, 2]"),
        ("aaaa", "shard = 2", "accumulate = 3"),
    ],
)
def test_awkward_parameters_train_sharded_as_in_one_process(
    nodes: str, layout: str, batch: str, tmp_path: Path
) -> None:
    assert_trains_as_one_process(nodes, TARGET, plan_text(layout, batch), tmp_path / "run")


@pytest.mark.parametrize(
    ("nodes", "layout"),
    [
        ("aa", "shard = 2"),
        ("aa", "shard = 2\nrecompute = true"),
        ("aa", "pipeline = 2"),
        ("ab", "pipeline = 2\nschedule = 'gpipe'\nmicro_batches = 3"),
        ("aa", "pipeline = 2\nstages = 2\nschedule = 'interleaved'"),
        ("aa", "pipeline = 2\nstages = 2\nschedule = 'zero_bubble'"),
        ("aaaa", "pipeline = 2\nshard = 2"),
        ("aaaa", "pipeline = 2\nshard = 2\nmicro_batches = 3\nschedule = 'gpipe'"),
        ("aaaa", "pipeline = 2\nstages = 2\nshard = 2\nschedule = 'interleaved'"),
        ("aabb", "pipeline = 2\nreplicate = 2"),
    ],
)
def test_blocks_train_divided_as_in_one_process(nodes: str, layout: str, tmp_path: Path) -> None:
    assert_trains_as_one_process(nodes, BLOCKS, plan_text(layout), tmp_path / "run")
