"""A small regression that writes down which samples each seat used, when a whole step of them was taken."""

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
    """Squared error after a nap; appends the indices of its samples, a line a call, to this seat's file."""

    def __init__(self, seen: Path, nap_s: float) -> None:
        self.seen = seen
        self.nap_s = nap_s

    def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The mean over the batch's samples."""
        x, index = batch
        time.sleep(self.nap_s)
        if model.training:
            with (self.seen / f"seat-{os.environ['SHOAL_SEAT']}").open("a") as file:
                file.write(",".join(str(i) for i in index.tolist()) + "\n")
        return (model(x) - torch.sin(x.sum(dim=1, keepdim=True))).square().mean()


def job(seen: str = "", num_samples: int = 50, nap_s: float = 0.02, rate: float = 0.1) -> shoal.Job:
    """A small network in float64."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(num_samples, 4, generator=generator, dtype=torch.float64)
    data = TensorDataset(x, torch.arange(num_samples))
    return shoal.Job(
        model=lambda: nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1)).double(),
        data=lambda: (data, data),
        loss=Loss(Path(seen), nap_s),
        optimizer=lambda p: SGD(p, rate),
    )
