"""The recipes do what their names say, to the number."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.optim import SGD

from shoal.job import decay_groups, warmup


def test_matrices_decay_and_vectors_do_not() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3), nn.Conv1d(1, 2, 3))
    groups = decay_groups(model.parameters(), 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert {p.dim() for p in groups[0]["params"]} == {2, 3}
    assert {p.dim() for p in groups[1]["params"]} == {1}


def test_no_parameter_is_lost_or_doubled() -> None:
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((), (1,), (0,), (2, 2), (0, 3), (1, 1, 1))]
    grouped = [p for group in decay_groups(iter(parameters), 0.5) for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, parameters))


@pytest.mark.parametrize("shapes", [[(3,)], [(3, 3)], []])
def test_an_empty_group_is_left_out(shapes: list[tuple[int, ...]]) -> None:
    groups = decay_groups([nn.Parameter(torch.zeros(shape)) for shape in shapes], 0.1)
    assert len(groups) == len(shapes)


def test_decay_goes_into_an_optimizer() -> None:
    layer = nn.Linear(2, 2)
    optimizer = SGD(decay_groups(layer.parameters(), 0.5), lr=1.0)
    before = layer.weight.detach().clone()
    for p in layer.parameters():
        p.grad = torch.zeros_like(p)
    bias = layer.bias.detach().clone()
    optimizer.step()
    assert torch.allclose(layer.weight, 0.5 * before)
    assert torch.equal(layer.bias, bias)


def rates(num_steps: int, steps: int, total: int | None = None, floor: float = 0.0) -> list[float]:
    """The rate that each of `num_steps` steps is taken with, for an optimizer's rate of 2."""
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = warmup(steps, total=total, floor=floor)(optimizer)
    found = []
    for _ in range(num_steps):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        schedule.step()
    return found


def test_warming_up_is_linear_and_then_constant() -> None:
    assert rates(7, 4) == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0])


def test_no_warming_up_is_the_full_rate_from_the_start() -> None:
    assert rates(3, 0) == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
def test_the_cosine_goes_from_the_full_rate_to_the_floor_and_stays(steps: int, floor: float) -> None:
    total = 20
    found = rates(30, steps, total, floor)
    assert found[steps] == pytest.approx(2.0)
    assert found[total:] == pytest.approx([2.0 * floor] * 10)
    middle = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (10 - steps) / (total - steps)))
    assert found[10] == pytest.approx(2.0 * middle)
    assert found[steps:] == sorted(found[steps:], reverse=True)


@pytest.mark.parametrize("total", [0, 1, 3])
def test_a_cosine_that_ends_before_the_warm_up_is_at_its_floor_after_it(total: int) -> None:
    assert rates(6, 3, total, 0.5)[4:] == pytest.approx([1.0, 1.0])
