"""A small regression that writes down which samples each rank used, and where rank 1 is slow."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import TensorDataset

import shoal


class Loss:
    """Squared error; appends the indices of its samples to this rank's file."""

    def __init__(self, seen: Path) -> None:
        self.seen = seen

    def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The mean over the batch's samples."""
        x, index = batch
        if os.environ["RANK"] == "1":
            time.sleep(0.15)
        with (self.seen / f"rank-{os.environ['RANK']}").open("a") as file:
            file.write("".join(f"{i}," for i in index.tolist()))
        return (model(x) - x.sum(dim=1, keepdim=True)).square().mean()


def job(seen: str = "", num_samples: int = 50) -> shoal.Job:
    """Linear regression in float64."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(num_samples, 4, generator=generator, dtype=torch.float64)
    return shoal.Job(
        model=lambda: nn.Linear(4, 1).double(),
        data=lambda: TensorDataset(x, torch.arange(num_samples)),
        loss=Loss(Path(seen)),
        optimizer=lambda p: SGD(p, 1e-2),
    )
