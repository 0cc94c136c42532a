"""Validation: each rank looks at its part of the validation data; sums over all ranks make the means exact."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from shoal.data.loader import Collate, num_samples, ordered_batches
from shoal.data.partition import spans
from shoal.engine.forward import Forward
from shoal.errors import JobError
from shoal.job.job import Metric


@dataclass(frozen=True, kw_only=True)
class Validator:
    """Measures the model on validation data.

    Attributes:
        rank, world_size: which part of the data this rank looks at, of how many.
        shards: so many consecutive parts belong to one replica, and need as many forward passes as each other.
        batch_size: samples a forward pass on one rank.
        sum: adds numbers up over all ranks.
        limit: look at so many samples at most, the first; 0: all.
    """

    dataset: Dataset[Any]
    forward: Forward
    metrics: Mapping[str, Metric]
    rank: int
    world_size: int
    batch_size: int
    limit: int
    collate: Collate | None
    sum: Callable[[list[float]], list[float]]
    shards: int = 1

    def __call__(self) -> dict[str, float]:
        """Return `val_loss` and each metric, means over samples, the same on every rank. Collective."""
        total = num_samples(self.dataset)
        total = min(total, self.limit) if self.limit else total
        parts = spans(total, [1.0] * self.world_size)
        first = self.rank - self.rank % self.shards
        passes = max(-(-len(part) // self.batch_size) for part in parts[first : first + self.shards])
        mine = parts[self.rank]
        names = ["val_loss", *self.metrics]
        self.forward.model.eval()
        try:
            with torch.no_grad():
                sums = self._sums(mine, len(names), passes)
        finally:
            self.forward.model.train()
        *values, count = self.sum([*sums, float(len(mine)) if self.forward.has_outputs else 0.0])
        return {name: value / count for name, value in zip(names, values, strict=True)}

    def _sums(self, mine: range, num_values: int, passes: int) -> list[float]:
        sums = [0.0] * num_values
        missing = passes - -(-len(mine) // self.batch_size)
        fill = itertools.repeat(range(1), missing)  # what other ranks of the replica need this one for
        for part in [mine, *fill]:
            for count, samples in ordered_batches(self.dataset, part, self.batch_size, self.collate):
                sums = self._added(sums, count if part is mine else 0, samples)
        return sums

    def _added(self, sums: list[float], count: int, samples: Any) -> list[float]:
        loss, outputs, moved = self.forward(samples)
        if not self.forward.has_outputs:
            return sums
        if self.metrics and outputs is None:
            raise JobError(
                f"the job has metrics ({', '.join(self.metrics)}), but its loss returns no outputs for them; "
                "return (loss, outputs)"
            )
        values = [loss, *(metric(outputs, moved) for metric in self.metrics.values())]
        return [total + count * float(value) for total, value in zip(sums, values, strict=True)]
