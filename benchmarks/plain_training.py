"""What the rivals' workers train: the job's own model, data and optimizer, by PyTorch's own sampler and loader."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from shoal.job.target import resolve


class PlainTraining:
    """One rank's part. `size` ranks share a batch of `batch` samples evenly, whoever is there."""

    def __init__(self, job: str, arguments: list[str], batch: int, rank: int, size: int) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        made = resolve(job, arguments).load()
        self.loss_of = made.loss
        self.model: nn.Module = made.model()
        self.optimizer = made.optimizer(list(self.model.parameters()))
        self.schedule = made.schedule(self.optimizer) if made.schedule else None
        data = made.data()
        self._dataset = data[0] if isinstance(data, tuple) else data
        self._sampler: Any = DistributedSampler(self._dataset, num_replicas=size, rank=rank, seed=0)
        self._loader: Any = DataLoader(self._dataset, batch_size=batch // size, sampler=self._sampler, drop_last=True)

    def batches(self, step: int) -> Iterator[Any]:
        """Batches from the one after `step` on, for ever."""
        epoch, passed = divmod(step, len(self._loader))
        while True:
            self._sampler.set_epoch(epoch)
            yield from islice(self._loader, passed, None)
            epoch, passed = epoch + 1, 0

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """The job's loss of one batch."""
        told = self.loss_of(model, batch)
        return told[0] if isinstance(told, tuple) else told

    def state(self) -> dict[str, Any]:
        """What a snapshot holds, apart from the step."""
        schedule = self.schedule.state_dict() if self.schedule else None
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "schedule": schedule}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a snapshot."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])


def seat() -> int:
    """The number of this worker's node: its name in the event log, which a restart does not change."""
    return int(os.environ["BENCHMARK_SEAT"])


class Stopwatch:
    """Seconds since it was last asked."""

    def __init__(self) -> None:
        self._at = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        before, self._at = self._at, time.perf_counter()
        return self._at - before
