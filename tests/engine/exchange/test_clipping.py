"""Clipping by the global norm is PyTorch's, also where every rank clips only its own portion."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from shoal.engine.exchange.clipping import clip
from shoal.strategy.bucket import Bucket
from shoal.wire.inprocess import run_in_process
from shoal.wire.transport import Memory


def reference(values: list[Tensor], max_norm: float) -> tuple[float, list[Tensor]]:
    parameters = [nn.Parameter(torch.zeros_like(v)) for v in values]
    for p, v in zip(parameters, values, strict=True):
        p.grad = v.clone()
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm.item(), [p.grad for p in parameters if p.grad is not None]


def square() -> Bucket:
    flat = torch.zeros(1, dtype=torch.float64)
    return Bucket("clipping", 1, flat, flat, slice(0, 1))


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("num_flags", [0, 2])
def test_the_ranks_of_a_node_clip_shared_memory_as_one_process_would(
    max_norm: float, num_ranks: int, num_flags: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(size, generator=generator, dtype=torch.float64) for size in (17, 1, 0, 5)]
    norm, expected = reference(values, max_norm)
    targets = [torch.cat([v, torch.ones(num_flags, dtype=torch.float64)]) for v in values]  # one memory, seen by all
    exchanges = []
    for rank in range(num_ranks):
        buckets = []
        for target in targets:
            num_values = len(target) - num_flags
            cuts = [len(target) * r // num_ranks for r in (rank, rank + 1)]
            buckets.append(Bucket.over("bucket", Memory(target, target, slice(*cuts)), num_values))
        exchanges.append(clip(buckets, max_norm, square(), shared=True))
    norms = run_in_process(exchanges, lambda rank, group: range(num_ranks))
    assert norms == pytest.approx([norm] * num_ranks, rel=1e-12)
    for target, value in zip(targets, expected, strict=True):
        torch.testing.assert_close(target[: len(value)], value, rtol=1e-12, atol=0)
        assert torch.all(target[len(value) :] == 1), "a flag is no gradient"


def test_memory_of_ones_own_needs_no_exchange() -> None:
    value = torch.tensor([3.0, 4.0])
    bucket = Bucket.over("bucket", Memory(value, value, slice(0, 2)), 2)
    (norm,) = run_in_process([clip([bucket], 1.0, square(), shared=False)], lambda rank, group: [0])
    assert norm == pytest.approx(5.0)
    torch.testing.assert_close(value, torch.tensor([0.6, 0.8]))


def test_a_norm_below_the_limit_changes_no_bit() -> None:
    value = torch.randn(9)
    before = value.clone()
    bucket = Bucket.over("bucket", Memory(value, value, slice(0, 9)), 9)
    run_in_process([clip([bucket], 1e6, square(), shared=False)], lambda rank, group: [0])
    assert torch.equal(value, before)
