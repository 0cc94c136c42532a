"""A small float64 regression with every awkward kind of parameter, to be held against a single process."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils.data import TensorDataset

import shoal

Batch = tuple[Tensor, Tensor, Tensor]


class Awkward(nn.Module):
    """A tied weight, a frozen layer, a parameter that is never used, and one that only some samples use."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.there = nn.Linear(8, 8, bias=False)
        self.back = nn.Linear(8, 8, bias=False)
        self.back.weight = self.there.weight
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.rare = nn.Linear(8, 8)
        self.never = nn.Parameter(torch.ones(5))
        self.last = nn.Linear(8, 1)
        self.double()

    def forward(self, x: Tensor, is_rare: Tensor) -> Tensor:
        """(batch, 6), (batch,) of bool to (batch, 1)."""
        hidden = self.there(torch.tanh(self.first(x)))
        hidden = self.frozen(torch.tanh(self.back(torch.tanh(hidden))))
        if is_rare.any():
            hidden = hidden + self.rare(hidden) * is_rare.unsqueeze(1)
        return self.last(torch.tanh(hidden))


def samples(num_samples: int) -> TensorDataset:
    """x (6,), y (1,), and whether the sample is one of the few rare ones."""
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(num_samples, 6, generator=generator, dtype=torch.float64)
    y = torch.sin(x.sum(dim=1, keepdim=True)) + 0.1 * torch.randn(num_samples, 1, generator=generator)
    return TensorDataset(x, y, torch.arange(num_samples) % 17 == 3)


class Loss:
    """Squared error, after a nap. With a folder, each call appends a digest of the parameters to a file of its rank."""

    def __init__(self, digests: Path | None, nap_s: float = 0.0) -> None:
        self.digests = digests
        self.nap_s = nap_s

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean over the batch's samples."""
        time.sleep(self.nap_s)
        if self.digests is not None and model.training:
            content = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
            with (self.digests / f"rank-{os.environ['RANK']}").open("a") as file:
                file.write(hashlib.sha256(content).hexdigest() + "\n")
        x, y, is_rare = batch
        return ((model(x, is_rare) - y) ** 2).mean()


def job(
    num_samples: int = 50, optimizer: Literal["adamw", "sgd"] = "adamw", digests: str = "", nap_s: float = 0.0
) -> shoal.Job:
    """AdamW with decay groups, a warm-up and a cosine; or plain SGD."""
    return shoal.Job(
        model=Awkward,
        data=lambda: samples(num_samples),
        loss=Loss(Path(digests) if digests else None, nap_s),
        optimizer=lambda p: AdamW(shoal.decay_groups(p, 0.1), 1e-2) if optimizer == "adamw" else SGD(p, 1e-2),
        schedule=shoal.warmup(3, total=20, floor=0.1),
    )


class Normalized(nn.Module):
    """Batch norm, whose running statistics each rank moves by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.last = nn.Linear(6, 1)
        self.double()

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        """(batch, 6) to (batch, 1)."""
        return self.last(self.norm(x))


def normalized() -> shoal.Job:
    """The same regression with batch norm."""
    return shoal.Job(model=Normalized, data=lambda: samples(48), loss=Loss(None), optimizer=lambda p: SGD(p, 1e-2))
