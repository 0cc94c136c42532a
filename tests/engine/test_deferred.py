"""Large parameters made later are what an ordinary build would hold, bit for bit, and draw as many random numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from shoal.engine.layout.deferred import build
from shoal.errors import JobError


class Arithmetic(nn.Module):
    """Parameters that come from others, slices that are changed, buffers, a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(40, 40), nn.Linear(40, 40)
        with torch.no_grad():
            self.one.weight[:3].mul_(2)
            self.one.weight += self.other.weight.t().clone()
        self.product = nn.Parameter(torch.randn(30, 40) @ self.one.weight.detach())
        self.tied = nn.Linear(40, 40)
        self.tied.weight = self.one.weight
        self.register_buffer("mask", torch.ones(50, 50).tril())


def orthogonal() -> nn.Module:
    layer = nn.Linear(32, 64)
    nn.init.orthogonal_(layer.weight, gain=0.5)
    return layer


def truncated() -> nn.Module:
    layer = nn.Linear(32, 64)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    return layer


MODELS: dict[str, Callable[[], nn.Module]] = {
    "arithmetic": Arithmetic,
    "double": lambda: Arithmetic().double(),
    "orthogonal": orthogonal,
    "truncated": truncated,
    "transformer": lambda: nn.TransformerEncoderLayer(16, 4),
    "gru": lambda: nn.GRU(12, 12, num_layers=2),
    "convolution": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Embedding(50, 9, padding_idx=2)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("least", [0, 100, 10**9])
def test_what_is_made_later_is_what_an_ordinary_build_holds(name: str, least: int) -> None:
    torch.manual_seed(3)
    expected = MODELS[name]()
    after = torch.get_rng_state()
    torch.manual_seed(3)
    model, deferred = build(MODELS[name], least)
    assert torch.equal(torch.get_rng_state(), after)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert deferred.names == {key for key, value in state.items() if value.is_meta}
    assert (deferred.names == set()) == (least == 10**9)
    for key, value in {**dict(expected.named_parameters()), **dict(expected.named_buffers())}.items():
        made = deferred.make(key) if key in deferred.names else state[key]
        assert torch.equal(made, value), key
        assert made.dtype == value.dtype


def test_digests_tell_other_numbers_apart() -> None:
    digests = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        digests.append(build(MODELS["gru"], 0)[1].digest())
    assert digests[0] == digests[1] != digests[2]


def test_a_constructor_that_looks_at_large_values_is_refused() -> None:
    with pytest.raises(JobError, match=r"looks at the values of a large parameter.*defer_above"):
        build(lambda: nn.Linear(30, 30) if torch.randn(30, 30).sum() > 0 else nn.Linear(20, 20), 100)
