"""Every layout trains as one process does: float64, against a plain PyTorch loop."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from layout_runs import final_model, pieces_in, relative_difference
from replicas import CLIP_NORM, SEED, TARGET
from torch import Tensor

from shoal.data.order import shuffled
from shoal.engine import random_state
from shoal.errors import PlanError, WorkerFailedError
from shoal.job.target import resolve
from shoal.plan import parse_plan, resolve_plan
from shoal.run import Run
from training_runs import events_of, newest_checkpoint, train_on

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
        pytest.param("aaa", "shard = 3", "accumulate = 2", marks=pytest.mark.slow),
        ("aabb", "shard = 2", "shares = [3, 1, 2, 2]"),
        pytest.param("aaaa", "shard = 2", "accumulate = 3", marks=pytest.mark.slow),
    ],
)
def test_awkward_parameters_train_sharded_as_in_one_process(
    nodes: str, layout: str, batch: str, tmp_path: Path
) -> None:
    assert_trains_as_one_process(nodes, TARGET, plan_text(layout, batch), tmp_path / "run")


@pytest.mark.parametrize(
    ("nodes", "layout"),
    [
        pytest.param("aa", "shard = 2", marks=pytest.mark.slow),
        ("aa", "shard = 2\nrecompute = true\nkeep_gathered = true"),
        ("aa", "pipeline = 2"),
        ("ab", "pipeline = 2\nschedule = 'gpipe'\nmicro_batches = 3"),
        ("aa", "pipeline = 2\nstages = 2\nschedule = 'interleaved'"),
        ("aa", "pipeline = 2\nstages = 2\nschedule = 'zero_bubble'"),
        pytest.param("aaaa", "pipeline = 2\nshard = 2", marks=pytest.mark.slow),
        ("aaaa", "pipeline = 2\nshard = 2\nmicro_batches = 3\nschedule = 'gpipe'"),
        pytest.param("aaaa", "pipeline = 2\nstages = 2\nshard = 2\nschedule = 'interleaved'", marks=pytest.mark.slow),
        ("aabb", "pipeline = 2\nreplicate = 2"),
        ("aa", "tensor = 2"),
        ("aaaa", "shard = 2\ntensor = 2\ndefer_above = 20"),
        ("aaaa", "shard = 2\npipeline = 2\ndefer_above = 20"),
        ("aa", "shard = 2\ndefer_above = 0"),
        pytest.param("aaaa", "tensor = 2\nshard = 2", marks=pytest.mark.slow),
        ("aabb", "tensor = 2\npipeline = 2"),
        ("aaaaaaaa", "tensor = 2\nshard = 2\npipeline = 2"),
        pytest.param("aaaabbbb", "replicate = 2\nshard = 2\npipeline = 2\nrecompute = true", marks=pytest.mark.slow),
    ],
)
def test_blocks_train_divided_as_in_one_process(nodes: str, layout: str, tmp_path: Path) -> None:
    assert_trains_as_one_process(nodes, BLOCKS, plan_text(layout), tmp_path / "run")


def test_the_tensor_axis_divides_what_the_table_names(tmp_path: Path) -> None:
    run = train_on(["a", "a"], BLOCKS, plan_text("tensor = 2"), tmp_path / "run")
    pieces = pieces_in(newest_checkpoint(run), rank=1)
    assert pieces["blocks.0.qkv.weight"].rows == ((4, 8), (12, 16), (20, 24))
    assert pieces["blocks.0.out.weight"].columns == (4, 8)
    assert pieces["blocks.3.mlp.0.bias"].rows == ((16, 32),)
    assert pieces["blocks.3.mlp.2.bias"].is_whole
    [layout] = events_of(run, "layout")
    assert "tensor = 2 lies inside nodes" in layout["sentences"][0]
    assert "embed (embed's dimension of 13 does not divide into 2)" in layout["sentences"][-1]


@pytest.mark.parametrize(
    ("layout", "nodes"), [pytest.param("tensor = 2", "aa", marks=pytest.mark.slow), ("tensor = 2\nshard = 2", "aaaa")]
)
def test_encoder_layers_and_large_embeddings_are_divided(layout: str, nodes: str, tmp_path: Path) -> None:
    target = BLOCKS.replace(":job", ":encoder")
    assert_trains_as_one_process(nodes, target, plan_text(layout), tmp_path / "run")
    [event] = events_of(Run(tmp_path / "run"), "layout")
    assert not any("whole on every rank" in sentence for sentence in event["sentences"])


@pytest.mark.parametrize(
    ("first", "second", "nodes"),
    [
        ("shard = 2", "pipeline = 2", "aa"),
        pytest.param("tensor = 2\nshard = 2", "replicate = 4", "aaaa", marks=pytest.mark.slow),
        pytest.param("replicate = 2", "tensor = 2", "aa", marks=pytest.mark.slow),
        ("pipeline = 2\nshard = 2", "shard = 3", "aaa"),
    ],
)
def test_a_run_goes_on_under_another_layout(first: str, second: str, nodes: str, tmp_path: Path) -> None:
    size = 4 if "\n" in first else 2
    plan = plan_text(first).replace(f"steps = {STEPS}", "steps = 4")
    run = train_on(["a"] * size, BLOCKS, plan, tmp_path / "run")
    before = final_model(run)
    unmoved = train_on(
        list(nodes), BLOCKS, plan_text(second).replace(f"steps = {STEPS}", "steps = 4"), run.path, resume=True
    )
    moved = final_model(unmoved)
    assert {name: value for name, value in moved.items() if name in before}.keys() == before.keys()
    assert all(torch.equal(moved[name], value) for name, value in before.items())  # bit-exact
    ended = train_on(list(nodes), BLOCKS, plan_text(second), run.path, resume=True)
    expected, _, _ = single_process(BLOCKS)
    for name, value in final_model(ended).items():
        assert relative_difference(value, expected[name]) < 1e-9, name


@pytest.mark.parametrize(
    ("layout", "sync"),
    [
        ("shard = 2", "kind = 'local'\nevery = 1\nfragments = 1\noverlap = 0\nouter_lr = 1.0\nouter_momentum = 0.0"),
        pytest.param("tensor = 2", "kind = 'local'\nevery = 2\nfragments = 2\noverlap = 1", marks=pytest.mark.slow),
        ("pipeline = 2", "kind = 'gossip'"),
    ],
)
def test_divided_replicas_agree_by_any_sync_as_whole_ones_do(layout: str, sync: str, tmp_path: Path) -> None:
    even = ["num_samples=48"]  # else an epoch's last batch is divided otherwise among four than among two
    divided = train_on(list("aabb"), BLOCKS, plan_text(layout, sync=sync), tmp_path / "divided", settings=even)
    whole = train_on(list("ab"), BLOCKS, plan_text("replicate = 2", sync=sync), tmp_path / "whole", settings=even)
    expected = final_model(whole)
    for name, value in final_model(divided).items():
        assert relative_difference(value, expected[name]) < 1e-9, name


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("shard = 3\nreplicate = 2", r"shard 3 needs 6 ranks, but there are 4; the nearest that fit are"),
        ("pipeline = 2\nschedule = 'interleaved'", r"needs several stages on each rank"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(layout: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        resolve_plan(parse_plan(plan_text(layout), origin="test"), 4)


@pytest.mark.parametrize(
    ("job", "layout", "message"),
    [
        ("blocks.py:job", "pipeline = 2\nstages = 9\nschedule = 'interleaved'", r"fewer than the 18 stages"),
        ("blocks.py:whole_matrices", "shard = 2", r"LBFGS looks at whole matrices"),
        (
            "blocks.py:untraceable",
            "pipeline = 2",
            r"cannot be cut into a pipeline's stages.*blocks\.py:\d+ \(if x\.sum",
        ),
        (
            "blocks.py:indivisible",
            "tensor = 2",
            r"embed cannot be divided: embed's dimension of 13 does not divide into 2",
        ),
    ],
)
def test_a_model_that_cannot_be_divided_is_refused_with_the_place(
    job: str, layout: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(WorkerFailedError, match=message):
        train_on(["a", "a"], str(Path(BLOCKS).parent / job), plan_text(layout), tmp_path / "run")
