"""A job that goes wrong in one chosen way, on one chosen rank, at one chosen step."""

from __future__ import annotations

import os
import signal
import time
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import Dataset, TensorDataset

import shoal

Batch = tuple[Tensor, Tensor]
Fault = Literal["", "raise", "nan", "exit", "kill", "hang", "hang in backward"]


class Loss:
    """Squared error, and a fault on `rank` in the forward pass of step `at`, counted from 1."""

    def __init__(self, fault: Fault, rank: int, at: int, nap_s: float) -> None:
        self.fault, self.rank, self.at, self.nap_s = fault, rank, at, nap_s
        self.calls = 0

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean over the batch's samples."""
        self.calls += 1
        time.sleep(self.nap_s)
        x, y = batch
        loss = ((model(x) - y) ** 2).mean()
        if self.calls == self.at and int(os.environ["RANK"]) == self.rank:
            return self.go_wrong(loss)
        return loss

    def go_wrong(self, loss: Tensor) -> Tensor:
        """The fault."""
        match self.fault:
            case "raise":
                raise LookupError("no such token: 'fish'")
            case "nan":
                return loss * torch.nan
            case "exit":
                print("the disk of this rank is on fire", flush=True)
                os._exit(7)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                time.sleep(3600)
            case "hang in backward":
                loss.register_hook(lambda _: time.sleep(3600))
        return loss


class Broken(Dataset[Batch]):
    """One sample cannot be read."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Batch:
        if index == 13:
            raise LookupError(f"sample {index} is torn")
        return torch.ones(4), torch.ones(1)


def samples(num_samples: int) -> TensorDataset:
    """x (4,), y (1,)."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(num_samples, 4, generator=generator)
    return TensorDataset(x, x.sum(dim=1, keepdim=True))


def job(
    fault: Fault = "",
    rank: int = 1,
    at: int = 5,
    nap_s: float = 0.0,
    num_samples: int = 64,
    width: int = 8,
    rate: float = 1e-2,
) -> shoal.Job:
    """A small perceptron under SGD."""
    return shoal.Job(
        model=lambda: nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1)),
        data=lambda: samples(num_samples),
        loss=Loss(fault, rank, at, nap_s),
        optimizer=lambda p: SGD(p, rate),
    )


def broken_data() -> shoal.Job:
    """A dataset that raises."""
    return shoal.Job(
        model=lambda: nn.Linear(4, 1), data=Broken, loss=Loss("", 0, 0, 0.0), optimizer=lambda p: SGD(p, 1e-2)
    )


def no_job() -> str:
    """Not a job at all."""
    return "a fish"
