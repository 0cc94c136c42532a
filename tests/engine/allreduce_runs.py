"""What tests of elastic all-reduce have in common: the plan, plain PyTorch's course, and what the log must prove."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path

import psutil
import pytest
import torch
from elastic_runs import LEASE_S, events
from replicas import BATCH, CLIP_NORM, NUM_SAMPLES, SEED, Replica, samples_of
from torch import Tensor

from shoal.events import Event
from shoal.run import Run
from training_runs import final_state


def plan(folder: Path, *, min_nodes: int = 2, more: str = "", elastic: str = "") -> list[str]:
    """The option that names a plan under which workers may be lost."""
    path = folder / "plan.toml"
    path.write_text(
        f"""
        seed = {SEED}
        [batch]
        size = {BATCH}
        [compute]
        device = "cpu"
        clip_norm = {CLIP_NORM}
        [validation]
        every = 0
        [elastic]
        min_nodes = {min_nodes}
        lease_s = {LEASE_S}
        {elastic}
        {more}
        """
    )
    return ["--plan", str(path)]


@cache
def single_process(steps: int) -> tuple[dict[str, Tensor], list[float]]:
    """The reference: whole batches in one process, nothing of the engine but its seed; (parameters, losses)."""
    replica, losses = Replica(0), []
    for step in range(steps):
        [samples] = samples_of(step, (1.0,))
        losses.append(replica.gradient(samples))
        replica.update()
    return dict(replica.model.named_parameters()), losses


def causes(run: Run) -> list[str]:
    """Why there was each view, in order."""
    return list({event["epoch"]: event["cause"] for event in events(run, "view")}.values())


def committed(run: Run) -> dict[int, Event]:
    """Each step that counts, as the latest view that took it told it."""
    return {event["step"]: event for event in events(run, "step")}


def assert_as_plain_pytorch(run: Run, steps: int) -> None:
    """Every step's loss and the final parameters are those of one process, up to the order of sums."""
    parameters, losses = single_process(steps)
    told = committed(run)
    assert sorted(told) == list(range(1, steps + 1)), "a step is missing"
    for step, loss in enumerate(losses, start=1):
        assert told[step]["loss"] == pytest.approx(loss, rel=1e-9)
    state = final_state(run)["model"]
    for name, parameter in parameters.items():
        assert torch.allclose(state[name], parameter.detach(), rtol=1e-9, atol=1e-11), name


def assert_each_sample_once(run: Run, num_samples: int = NUM_SAMPLES) -> None:
    """The batches of each whole epoch, as the log tells them, tile its order."""
    places: dict[int, Counter[int]] = {}
    for event in committed(run).values():
        taken = range(event["first"], event["first"] + event["samples"])
        places.setdefault(event["epoch"], Counter()).update(taken)
    for epoch in sorted(places)[:-1]:
        assert places[epoch] == Counter(range(num_samples)), f"epoch {epoch}"


def assert_never_back(run: Run) -> None:
    """No worker that lives on ever takes a step again that it has committed."""
    for source in {event["source"] for event in events(run, "step")}:
        steps = [event["step"] for event in events(run, "step") if event["source"] == source]
        assert steps == sorted(set(steps)), source


def assert_nothing_runs(run: Run) -> None:
    words = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not [line for line in words if any(str(run.path) in word for word in line)]
