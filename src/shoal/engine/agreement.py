"""What all ranks must know about a step before it counts: one small vector, summed exactly with the gradients.

It carries the loss, a flag for each rank whose loss is not finite, votes to stop, and which parameters have a gradient
anywhere. Every rank reads the same sums, so all decide alike without another message.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.strategy.bucket import Bucket
from shoal.wire.transport import Memory

_LOSS, _STOP, _HEAD = 0, 1, 2


@dataclass(frozen=True)
class Verdict:
    """What the step came to, the same on every rank.

    Attributes:
        loss: the mean over the global batch.
        non_finite_ranks: ranks whose own loss was NaN or infinite.
        stop: somebody asked to stop after this step.
        used: for each parameter, on how many ranks it has a gradient.
    """

    loss: float
    non_finite_ranks: list[int]
    stop: bool
    used: list[float]


class Agreement:
    """The vector of one run: [loss, stop votes, a flag a rank, a flag a parameter], float64."""

    def __init__(
        self, rank: int, world_size: int, num_parameters: int, allocate: Callable[[int, torch.dtype], Memory]
    ) -> None:
        self._rank = rank
        self._world_size = world_size
        memory = allocate(_HEAD + world_size + num_parameters, torch.float64)
        self.bucket = Bucket("agreement", memory.source, memory.target, memory.portion)

    def propose(self, weighted_loss: float, used: Tensor, *, stop: bool) -> None:
        """Write this rank's part. `weighted_loss`: its share's part of the global mean."""
        head = torch.zeros(_HEAD + self._world_size, dtype=torch.float64)
        finite = math.isfinite(weighted_loss)
        head[_LOSS] = weighted_loss if finite else 0.0
        head[_STOP] = float(stop)
        head[_HEAD + self._rank] = float(not finite)
        self.bucket.source.copy_(torch.cat([head, used]))

    def read(self) -> Verdict:
        """Read the sums, after the exchange of `bucket`."""
        values = self.bucket.target.tolist()
        flags = values[_HEAD : _HEAD + self._world_size]
        bad = [rank for rank, flag in enumerate(flags) if flag > 0]
        return Verdict(
            loss=math.nan if bad else values[_LOSS],
            non_finite_ranks=bad,
            stop=values[_STOP] > 0,
            used=values[_HEAD + self._world_size :],
        )
