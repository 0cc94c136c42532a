"""Shares change while training runs, by speed and by memory, and the model is the one that plain PyTorch trains."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from shoal.data.order import shuffled
from shoal.engine import random_state
from shoal.errors import WorkerFailedError
from shoal.job.target import resolve
from shoal.run import Run
from training_runs import events_of, final_state, train_on

BATCH, NUM_SAMPLES, CLIP_NORM, SEED = 24, 100, 0.5, 5
TARGET = str(Path(__file__).parents[1] / "jobs" / "unlike.py") + ":job"


@cache
def single_process(steps: int, clip_norm: float = CLIP_NORM) -> tuple[dict[str, Tensor], list[float]]:
    """The reference: whole batches in one process, nothing of the engine but its seed; (parameters, losses)."""
    job = resolve(TARGET, [f"num_samples={NUM_SAMPLES}"]).load()
    random_state.seed_all(SEED, 0)
    data, model = job.data(), job.model()
    trainable = list(model.parameters())
    update = job.optimizer(trainable)
    losses = []
    for step in range(steps):
        epoch, place = divmod(step, -(-NUM_SAMPLES // BATCH))
        order = shuffled(np.arange(NUM_SAMPLES), NUM_SAMPLES, seed=SEED, epoch=epoch)
        update.zero_grad()
        loss = job.loss(model, data[torch.from_numpy(order[place * BATCH : (place + 1) * BATCH])])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, clip_norm)
        update.step()
        losses.append(loss.item())
    return dict(model.named_parameters()), losses


def run_on(nodes: str, folder: Path, steps: int, settings: Sequence[str], *, batch: str = "", more: str = "") -> Run:
    plan = f"""
        seed = {SEED}
        [sync]
        bucket_mb = 0.0005
        [batch]
        size = {BATCH}
        balance = true
        {batch}
        [compute]
        device = "cpu"
        clip_norm = {CLIP_NORM}
        [validation]
        every = 0
        [stop]
        steps = {steps}
        {more}
    """
    given = [f"num_samples={NUM_SAMPLES}", *settings]
    return train_on(list(nodes), TARGET, plan, folder / "run", settings=given)


def assert_as_plain_pytorch(run: Run, steps: int) -> None:
    expected, losses = single_process(steps)
    trained = final_state(run)["model"]
    for name, value in expected.items():
        assert (trained[name] - value).norm() <= 1e-12 * value.norm(), name
    assert [event["loss"] for event in events_of(run, "step")] == pytest.approx(losses, rel=1e-12)


@pytest.mark.parametrize(("nodes", "accumulate"), [("abc", 1), ("aab", 2)])
def test_a_slow_rank_gets_fewer_samples_and_the_gradient_stays_the_exact_mean(
    nodes: str, accumulate: int, tmp_path: Path
) -> None:
    run = run_on(nodes, tmp_path, 60, ["slow_rank=1", "nap_s=0.004"], batch=f"accumulate = {accumulate}")
    assert_as_plain_pytorch(run, 60)
    changes = events_of(run, "rebalanced")
    assert changes, "nothing was balanced: this shows nothing"
    for event in changes:
        assert sum(event["shares"]) == BATCH
        assert event["step"] < 60
    slow, *others = (events_of(run, "step", f"rank-{rank}") for rank in (1, 0, 2))
    assert slow[0]["share"] == BATCH // 3
    assert slow[-2]["share"] <= 5 < 8 < min(steps[-2]["share"] for steps in others)
    each = changes[-1]["seconds_per_sample"]
    assert each[1] > 2 * max(each[0], each[2])
    # Of the whole step, most was waited for the slow rank at first.
    assert others[0][-2]["step_s"] < others[0][5]["step_s"]


def test_balance_begins_with_the_shares_that_are_given(tmp_path: Path) -> None:
    run = run_on("ab", tmp_path, 5, [], batch="shares = [3, 1]")
    assert_as_plain_pytorch(run, 5)
    assert [events_of(run, "step", f"rank-{rank}")[0]["share"] for rank in (0, 1)] == [18, 6]


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize(("nodes", "accumulate"), [("abc", 1), ("aa", 2)])
def test_a_rank_out_of_memory_gets_less_and_no_step_is_lost(
    where: str, nodes: str, accumulate: int, tmp_path: Path
) -> None:
    settings = ["small_rank=1", "room=3", f"where={where}"]
    run = run_on(nodes, tmp_path, 12, settings, batch=f"accumulate = {accumulate}")
    assert_as_plain_pytorch(run, 12)
    small = events_of(run, "step", "rank-1")
    assert [event["step"] for event in small] == list(range(1, 13))
    assert 0 < max(event["share"] for event in small) <= 3 * accumulate
    told = events_of(run, "out_of_memory", "rank-1")
    assert told[0]["samples"] == BATCH // len(nodes)
    assert len(told) == len(events_of(run, "rebalanced")) >= 2
    assert "too" in told[0]["message"]
    assert not events_of(run, "out_of_memory", "rank-0")


def test_running_statistics_do_not_see_a_step_that_was_dropped(tmp_path: Path) -> None:
    """Rank 1 runs out of memory in backward, when all forwards are done."""
    run = run_on("ab", tmp_path, 6, ["small_rank=1", "room=3", "where=backward"])
    assert events_of(run, "out_of_memory", "rank-1")
    assert final_state(run)["model"]["norm.num_batches_tracked"].item() == 6


def test_where_no_share_is_small_enough_the_run_ends_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(WorkerFailedError, match="rank 1 ran out of memory with 1 sample"):
        run_on("ab", tmp_path, 5, ["small_rank=1", "room=0"])


def test_a_resumed_run_remembers_what_a_rank_can_hold(tmp_path: Path) -> None:
    plan = "[checkpoint]\nevery = 3"
    run = run_on("ab", tmp_path, 6, ["small_rank=1", "room=3"], more=plan)
    dropped = len(events_of(run, "out_of_memory", "rank-1"))
    speeds = final_state(run)["experience"]["speeds"]
    assert speeds["1"]["limit"] <= 3
    assert speeds["0"]["limit"] is None
    assert dropped


def test_memory_that_comes_short_under_a_codec_leaves_all_replicas_equal(tmp_path: Path) -> None:
    run = run_on("abc", tmp_path, 12, ["small_rank=2", "room=3", "where=backward"], more='[codec]\nkind = "int8"')
    assert [event["step"] for event in events_of(run, "step")] == list(range(1, 13))
    _, losses = single_process(12)
    assert [event["loss"] for event in events_of(run, "step")] == pytest.approx(losses, rel=0.05)
