"""A float64 regression on ranks that differ: one is slow, and one has little memory."""

from __future__ import annotations

import os
import time

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import TensorDataset

import shoal

Batch = tuple[Tensor, Tensor]


class Loss:
    """Squared error. `slow_rank` sleeps for each sample; `small_rank` holds no more than `room` samples at once."""

    def __init__(self, slow_rank: int, nap_s: float, small_rank: int, room: int, where: str) -> None:
        self.slow_rank, self.nap_s = slow_rank, nap_s
        self.small_rank, self.room, self.where = small_rank, room, where

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean over the batch's samples."""
        x, y = batch
        rank = int(os.environ.get("RANK", -2))
        if model.training:
            time.sleep(len(x) * self.nap_s * (4 if rank == self.slow_rank else 1))
        lacks = model.training and rank == self.small_rank and len(x) > self.room
        if lacks and self.where == "forward":
            raise MemoryError(f"{len(x)} samples are too many")
        hidden = model(x)
        if lacks:
            hidden.register_hook(_refuse)
        return ((hidden - y) ** 2).mean()


def _refuse(_: Tensor) -> None:
    raise MemoryError("backward is too large")


class Model(nn.Module):
    """Batch norm's statistics are moved by every forward; its output is not used, so they change nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 1)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 6) to (batch, 1)."""
        if len(x) > 1:
            self.norm(x)
        return self.last(torch.tanh(self.first(x)))


def job(
    slow_rank: int = -1,
    nap_s: float = 0.0,
    small_rank: int = -1,
    room: int = 0,
    where: str = "forward",
    num_samples: int = 100,
) -> shoal.Job:
    """AdamW on a small perceptron."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(num_samples, 6, generator=generator, dtype=torch.float64)
    y = torch.sin(x.sum(dim=1, keepdim=True))
    return shoal.Job(
        model=Model,
        data=lambda: TensorDataset(x, y),
        loss=Loss(slow_rank, nap_s, small_rank, room, where),
        optimizer=lambda p: AdamW(p, 1e-2),
    )
