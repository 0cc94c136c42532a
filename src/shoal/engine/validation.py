"""Validation: each rank looks at its part of the validation data; sums over all ranks make the means exact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from shoal.data.loader import Collate, num_samples, ordered_batches
from shoal.data.partition import spans
from shoal.engine.forward import Forward
from shoal.errors import JobError
from shoal.job.job import Metric
from shoal.wire.collectives import sum_over_world


@dataclass(frozen=True, kw_only=True)
class Validator:
    """Measures the model on validation data.

    Attributes:
        batch_size: samples a forward pass on one rank.
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

    def __call__(self) -> dict[str, float]:
        """Return `val_loss` and each metric, means over samples, the same on every rank. Collective."""
        total = num_samples(self.dataset)
        total = min(total, self.limit) if self.limit else total
        mine = spans(total, [1.0] * self.world_size)[self.rank]
        names = ["val_loss", *self.metrics]
        self.forward.model.eval()
        try:
            with torch.no_grad():
                sums = self._sums(mine, len(names))
        finally:
            self.forward.model.train()
        *values, count = sum_over_world([*sums, float(len(mine))])
        return {name: value / count for name, value in zip(names, values, strict=True)}

    def _sums(self, mine: range, num_values: int) -> list[float]:
        sums = [0.0] * num_values
        for count, samples in ordered_batches(self.dataset, mine, self.batch_size, self.collate):
            loss, outputs, moved = self.forward(samples)
            if self.metrics and outputs is None:
                raise JobError(
                    f"the job has metrics ({', '.join(self.metrics)}), but its loss returns no outputs for them; "
                    "return (loss, outputs)"
                )
            values = [loss, *(metric(outputs, moved) for metric in self.metrics.values())]
            sums = [total + count * float(value) for total, value in zip(sums, values, strict=True)]
        return sums
