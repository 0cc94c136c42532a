"""A tiny recommender: which of many items is liked, from a sparse table on the servers and a dense layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import TensorDataset

import shoal

ROWS = 1_000_000


class Clicks(nn.Module):
    """A row of the table for each item, and a linear layer over it."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.items = shoal.SparseTable(rows, 8, optimizer="sgd", lr=0.5, std=0.3, dtype=torch.float64)
        self.last = nn.Linear(8, 1).double()

    def forward(self, items: Tensor) -> Tensor:
        """(batch,) of ids to (batch,) of logits."""
        return self.last(self.items(items)).squeeze(1)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean binary cross-entropy."""
    items, liked = batch
    return nn.functional.binary_cross_entropy_with_logits(model(items), liked)


def samples() -> TensorDataset:
    """Sixty of a million ids, each liked or not."""
    ids = torch.arange(60) * 16_661
    return TensorDataset(ids, (torch.arange(60) % 3 == 0).double())


def job(rows: int = ROWS) -> shoal.Job:
    """SGD everywhere."""
    return shoal.Job(model=lambda: Clicks(rows), data=samples, loss=loss, optimizer=lambda p: SGD(p, 0.5))
