"""Gossip held against D-PSGD written out with its matrix, and against what its paper promises."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from replicas import STEPS, TARGET, Replica, plan_text, samples_of
from torch import Tensor

from shoal.strategy.sync.gossip import GossipConfig, graph_of
from training_runs import events_of, final_state, final_tensors, train_on


def mixing_matrix(topology: str, size: int, step: int) -> Tensor:
    """W of one step: Metropolis-Hastings weights, shape (size, size)."""
    graph = graph_of(GossipConfig(topology=topology), size, step=step)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    degree = [sum(rank in edge for edge in graph.edges) for rank in range(size)]
    for a, b in graph.edges:
        matrix[a, b] = matrix[b, a] = 1 / (1 + max(degree[a], degree[b]))
    return matrix + torch.diag(1 - matrix.sum(dim=1))


def reference(topology: str, shares: tuple[float, ...]) -> dict[str, Tensor]:
    """The mean of all replicas after D-PSGD: the gradient is that of the parameters before mixing."""
    replicas = [Replica(rank) for rank in range(len(shares))]
    for step in range(STEPS):
        samples = samples_of(step, shares)
        for replica, mine in zip(replicas, samples, strict=True):
            replica.gradient(mine, len(mine) * len(shares) / sum(map(len, samples)))
        matrix = mixing_matrix(topology, len(shares), step)
        for together in zip(*(r.parameters for r in replicas), strict=True):
            before = torch.stack([p.detach() for p in together])
            for p, row in zip(together, matrix, strict=True):
                p.data.copy_(torch.tensordot(row, before, dims=1))
        for replica in replicas:
            replica.update()
    for together in zip(*(r.parameters for r in replicas), strict=True):
        together[0].data.copy_(torch.stack([p.detach() for p in together]).mean(dim=0))
    return replicas[0].model.state_dict()


@pytest.mark.parametrize(
    ("topology", "shares"), [("ring", (1.0, 2.0, 3.0, 1.0)), ("matching", (1.0, 1.0, 1.0)), ("exponential", (1.0, 1.0))]
)
def test_gossip_is_d_psgd_with_its_matrix(topology: str, shares: tuple[float, ...], tmp_path: Path) -> None:
    plan = plan_text(f'kind = "gossip"\ntopology = "{topology}"\nbucket_mb = 0.0003', batch=f"shares = {list(shares)}")
    run = train_on([f"n{rank}" for rank in range(len(shares))], TARGET, plan, tmp_path / "run")
    trained = final_state(run)["model"]
    for key, value in reference(topology, shares).items():
        assert (trained[key] - value).norm() / value.norm() < 1e-10, key


@pytest.mark.parametrize("codec", [pytest.param("none", marks=pytest.mark.slow), "int8"])
def test_a_gossip_run_that_was_resumed_ends_with_the_same_bits(codec: str, tmp_path: Path) -> None:
    plan = plan_text('kind = "gossip"', codec=codec)
    whole = train_on(["a", "b"], TARGET, plan, tmp_path / "whole")
    cut = train_on(["a", "b"], TARGET, plan, tmp_path / "cut")
    for path in cut.checkpoints.glob("step-*"):
        if path.name != "step-00000005":
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
    resumed = train_on(["a", "b"], TARGET, plan, tmp_path / "cut", resume=True)
    assert events_of(resumed, "resumed")[0]["step"] == 5
    one, other = final_tensors(whole), final_tensors(resumed)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
