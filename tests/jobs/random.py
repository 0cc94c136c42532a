"""Training that draws at random wherever it can: dropout and noisy samples. Slow enough to be killed."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import Dataset

import shoal

Sample = tuple[Tensor, Tensor]


class Noisy(Dataset[Sample]):
    """Samples that are never twice the same; each that is fetched is noted by its index, in a file of this process."""

    def __init__(self, num_samples: int, log: Path | None) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(num_samples, 4, generator=generator, dtype=torch.float64)
        self.log = log

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Sample:
        if self.log is not None:
            with (self.log / f"{os.environ['RANK']}-{os.getpid()}").open("a") as file:
                file.write(f"{index}\n")
        scale = 1 + 0.1 * random.random() + 0.1 * np.random.rand()
        x = scale * self.x[index] + 0.1 * torch.randn(4, dtype=torch.float64)
        return x, self.x[index].sum().reshape(1)


class Loss:
    """Squared error, after a nap."""

    def __init__(self, nap_s: float) -> None:
        self.nap_s = nap_s

    def __call__(self, model: nn.Module, batch: Sample) -> Tensor:
        """The mean over the batch's samples."""
        time.sleep(self.nap_s)
        x, y = batch
        return ((model(x) - y) ** 2).mean()


def model() -> nn.Module:
    """A perceptron with dropout."""
    return nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, 1)).double()


def job(num_samples: int = 46, nap_s: float = 0.0, log: str = "") -> shoal.Job:
    """AdamW under a schedule; validation data that are noisy too."""
    return shoal.Job(
        model=model,
        data=lambda: (Noisy(num_samples, Path(log) if log else None), Noisy(8, None)),
        loss=Loss(nap_s),
        optimizer=lambda p: AdamW(p, 1e-2),
        schedule=shoal.warmup(5, total=60),
    )
