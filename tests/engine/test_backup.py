"""With a rank to spare, a step does not wait for the slowest, and is the exact mean over those who came in time."""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from shoal.data.order import shuffled
from shoal.data.partition import spans
from shoal.engine import random_state
from shoal.errors import PlanError
from shoal.events import read_events
from shoal.job.target import resolve
from shoal.plan import parse_plan, resolve_plan
from training_runs import events_of, final_state, train_on

TARGET = str(Path(__file__).parents[1] / "jobs" / "sleepy.py") + ":job"
STEPS, BATCH, NUM_SAMPLES, SEED = 12, 15, 60, 5


def plan(sync: str) -> str:
    return f"""
        seed = {SEED}
        [sync]
        {sync}
        [batch]
        size = {BATCH}
        [compute]
        device = "cpu"
        [stop]
        steps = {STEPS}
    """


@pytest.mark.parametrize("nodes", ["abc", "aab"])
def test_a_slow_rank_holds_nobody_up_and_what_it_computed_is_dropped_and_counted(nodes: str, tmp_path: Path) -> None:
    started = time.perf_counter()
    run = train_on(list(nodes), TARGET, plan("backup = 1"), tmp_path / "run", settings=["nap_s=0.1"])
    took_s = time.perf_counter() - started
    dropped = events_of(run, "gradient_dropped", "rank-2")
    steps = events_of(run, "step", "rank-0")
    assert len(dropped) >= STEPS // 2, "rank 2 needs 1.2 s for its forward"
    median = sorted(event["step_s"] for event in steps)[STEPS // 2]
    assert median < 0.5, f"the steps waited for the slowest; the whole took {took_s:.0f} s"
    assert_exact_mean(run_events=[*read_events(run.events)], state=final_state(run)["model"])


def assert_exact_mean(run_events: list[dict[str, object]], state: dict[str, torch.Tensor]) -> None:
    """Plain PyTorch, on the samples of each step that were not dropped."""
    left_out: dict[tuple[object, object], set[int]] = defaultdict(set)
    for event in run_events:
        if event["kind"] == "gradient_dropped":
            left_out[event["epoch"], event["first"]].add(int(str(event["source"]).removeprefix("rank-")))
    job = resolve(TARGET, []).load()
    random_state.seed_all(SEED, 0)
    data, model = job.data(), job.model()
    update = job.optimizer(list(model.parameters()))
    for step in range(STEPS):
        epoch, place = divmod(step, NUM_SAMPLES // BATCH)
        order = shuffled(np.arange(NUM_SAMPLES), NUM_SAMPLES, seed=SEED, epoch=epoch)
        batch = order[place * BATCH : (place + 1) * BATCH]
        mine = [span for rank, span in enumerate(spans(BATCH, [1.0] * 3)) if rank not in left_out[epoch, place * BATCH]]
        chosen = torch.tensor([int(batch[i]) for span in mine for i in span])
        update.zero_grad()
        job.loss(model, data[chosen]).backward()
        update.step()
    for name, parameter in model.named_parameters():
        assert torch.allclose(state[name], parameter, rtol=1e-10, atol=1e-12), name


def test_ranks_of_one_speed_lose_nothing(tmp_path: Path) -> None:
    sync = "backup = 1\nbackup_grace = 10"
    run = train_on(["a", "b", "c"], TARGET, plan(sync), tmp_path / "run", settings=["nap_s=0.002", "rank=9"])
    dropped = [event for event in read_events(run.events) if event["kind"] == "gradient_dropped" and event["first"] > 0]
    assert len(dropped) <= 2, "there was time enough for everybody, but for the first steps, of which nothing is known"


@pytest.mark.parametrize(
    ("table", "what"),
    [("[batch]\nbalance = true", "batch.balance"), ('[codec]\nkind = "int8"', "a codec")],
)
def test_what_does_not_go_with_dropped_gradients_is_refused(table: str, what: str) -> None:
    text = f"[sync]\nbackup = 1\n{table}"
    with pytest.raises(PlanError, match=f"sync.backup does not fit {what}"):
        resolve_plan(parse_plan(text, origin="test"), 3)
