"""Ranks of a tensor group draw alike, but for what is divided among them."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from shoal.engine.layout.tensor.dice import draw_apart
from shoal.engine.layout.tensor.rules import find


def drawn(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask of a divided dropout on rank `index`, and what that rank draws afterwards."""
    torch.manual_seed(4)
    dropout = nn.Dropout(0.5)
    draw_apart(dropout, index)
    return dropout(torch.ones(1000)), torch.rand(3)


def test_divided_dropouts_differ_and_all_else_stays_equal() -> None:
    (one, after_one), (other, after_other) = drawn(0), drawn(1)
    agreement = float((one == other).float().mean())
    assert 0.4 < agreement < 0.6  # independent: half of all values agree by chance
    assert torch.equal(after_one, after_other)


def test_computing_again_draws_the_same() -> None:
    dropout = nn.Dropout(0.5)
    draw_apart(dropout, 1)
    x = torch.ones(64, requires_grad=True)
    y = checkpoint(lambda value: dropout(value) * value, x, use_reentrant=False)
    y.sum().backward()
    mask = y.detach()  # the mask times 1
    assert x.grad is not None
    assert torch.equal(x.grad, 2 * mask)


def test_nothing_is_drawn_in_evaluation() -> None:
    dropout = nn.Dropout(0.5).eval()
    draw_apart(dropout, 0)
    before = torch.get_rng_state()
    dropout(torch.ones(3))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_table_knows_which_dropouts_are_between() -> None:
    mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Dropout(0.1), nn.Linear(8, 4), nn.Dropout(0.1))
    model = nn.ModuleDict({"mlp": mlp, "layer": nn.TransformerEncoderLayer(4, 2)})
    between = {split.owner: split.between for split in find(model)}
    assert between == {"mlp": ("mlp.2",), "layer": ("layer.dropout",), "layer.self_attn": ()}
