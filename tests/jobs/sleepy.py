"""A model whose layers take their time on one rank."""

from __future__ import annotations

import os
import time

import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import TensorDataset

import shoal

Batch = tuple[Tensor, Tensor]
LAYERS = 12


class Sleepy(nn.Module):
    """A layer that naps first, on one rank."""

    def __init__(self, nap_s: float, rank: int) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.nap_s = nap_s if os.environ.get("RANK") == str(rank) else 0.0

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 6) to (batch, 6)."""
        time.sleep(self.nap_s)
        return x + torch.tanh(self.linear(x))


def samples(num_samples: int) -> TensorDataset:
    """x (6,), y (1,)."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(num_samples, 6, generator=generator, dtype=torch.float64)
    return TensorDataset(x, x.sum(dim=1, keepdim=True).sin())


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Squared error."""
    return ((model(batch[0]) - batch[1]) ** 2).mean()


def job(nap_s: float = 0.0, rank: int = 2, num_samples: int = 60) -> shoal.Job:
    """Plain SGD."""
    return shoal.Job(
        model=lambda: nn.Sequential(*(Sleepy(nap_s, rank) for _ in range(LAYERS)), nn.Linear(6, 1)).double(),
        data=lambda: samples(num_samples),
        loss=loss,
        optimizer=lambda p: SGD(p, 1e-2),
    )
