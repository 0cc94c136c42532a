"""What all ranks must know about a step before it counts: a few numbers, summed exactly while backward runs.

They carry the loss, a flag for each rank whose loss is not finite, and votes to stop. Every rank reads the same sums,
so all decide alike. They leave before the gradients: behind them they would wait in the queues of a slow link.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.strategy.agreement import HEAD, LOSS, STOP, agreement_bucket
from shoal.wire.transport import Memory


@dataclass(frozen=True)
class Verdict:
    """What the step came to, the same on every rank.

    Attributes:
        loss: the mean over the global batch.
        non_finite_ranks: ranks whose own loss was NaN or infinite.
        stop: somebody asked to stop after this step.
    """

    loss: float
    non_finite_ranks: list[int]
    stop: bool


class Agreement:
    """The vector of one run."""

    def __init__(self, rank: int, world_size: int, allocate: Callable[[int, torch.dtype], Memory]) -> None:
        self._rank = rank
        self.bucket = agreement_bucket(world_size, allocate)

    def propose(self, weighted_loss: Tensor, *, stop: bool) -> None:
        """Write this rank's part. `weighted_loss`: its share's part of the global mean, a scalar on any device."""
        part = self.bucket.source
        finite = weighted_loss.isfinite()
        part.zero_()
        part[LOSS] = weighted_loss.nan_to_num(0.0, 0.0, 0.0)
        part[STOP] = float(stop)
        part[HEAD + self._rank] = finite.logical_not()

    def read(self) -> Verdict:
        """Read the sums, after the exchange of `bucket`."""
        values = self.bucket.target.tolist()
        bad = [rank for rank, flag in enumerate(values[HEAD:]) if flag > 0]
        return Verdict(math.nan if bad else values[LOSS], bad, values[STOP] > 0)
