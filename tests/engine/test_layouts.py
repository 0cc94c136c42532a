"""Every layout trains as one process does: float64, against a plain PyTorch loop."""

from __future__ import annotations

from pathlib import Path

import pytest
from layout_runs import final_model, relative_difference
from replicas import CLIP_NORM, SEED, TARGET
from test_reference import NUM_SAMPLES, single_process

from training_runs import events_of, train_on

BATCH = 12


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
        steps = 20
    """


@pytest.mark.parametrize(
    ("nodes", "layout", "batch"),
    [
        ("aa", "shard = 2", ""),
        ("aaa", "shard = 3", "accumulate = 2"),
        ("aabb", "shard = 2", "shares = [3, 1, 2, 2]"),
        ("aaaa", "shard = 2", "accumulate = 3"),
    ],
)
def test_sharded_replicas_train_as_one_process(nodes: str, layout: str, batch: str, tmp_path: Path) -> None:
    run = train_on(list(nodes), TARGET, plan_text(layout, batch), tmp_path / "run")
    expected, losses = single_process("adamw", NUM_SAMPLES, BATCH)
    trained = final_model(run)
    for name, value in trained.items():
        assert relative_difference(value, expected[name]) < 1e-9, name
    assert [event["loss"] for event in events_of(run, "step")] == pytest.approx(losses, rel=1e-9)
