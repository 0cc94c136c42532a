"""What all ranks must know about a step before it counts: a few numbers, summed exactly while backward runs.

They carry the loss, a flag for each rank whose loss is not finite, votes, and how long each rank computed. Every rank
reads the same sums, so all decide alike. They leave before the gradients: behind them they would wait in the queues of
a slow link.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shoal.strategy.agreement import COLD, HEAD, LOSS, STOP, TURN, agreement_bucket
from shoal.wire.transport import Memory


@dataclass(frozen=True)
class Ballot:
    """What one rank puts to the others.

    Attributes:
        stop: it asks to stop after this step.
        turn: it is ready for the next view.
        cold: it has no state yet, and takes part without a share.
        seconds: it took for its share of the step before, without waiting for anybody; 0: it does not know.
    """

    stop: bool = False
    turn: bool = False
    cold: bool = False
    seconds: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """What the step came to, the same on every rank.

    Attributes:
        loss: the mean over the global batch.
        non_finite_ranks: ranks whose own loss was NaN or infinite.
        stop: somebody asked to stop after this step.
        turn: all are ready for the next view, and turn to it after this step.
        cold: somebody has no state yet.
        seconds: each rank's own, for its share of the step before; empty: nobody said.
    """

    loss: float
    non_finite_ranks: list[int]
    stop: bool
    turn: bool = False
    cold: bool = False
    seconds: list[float] = field(default_factory=list)


class Agreement:
    """The vector of one run."""

    def __init__(self, rank: int, world_size: int, allocate: Callable[[int, torch.dtype], Memory]) -> None:
        self._rank = rank
        self._world_size = world_size
        self.bucket = agreement_bucket(world_size, allocate)

    def propose(self, weighted_loss: Tensor, ballot: Ballot) -> None:
        """Write this rank's part. `weighted_loss`: its share's part of the global mean, a scalar on any device."""
        part = self.bucket.source
        finite = weighted_loss.isfinite()
        part.zero_()
        part[LOSS] = weighted_loss.nan_to_num(0.0, 0.0, 0.0)
        part[STOP], part[TURN] = float(ballot.stop), float(ballot.turn)
        part[COLD] = float(ballot.cold)
        part[HEAD + self._rank] = finite.logical_not()
        part[HEAD + self._world_size + self._rank] = ballot.seconds

    def read(self) -> Verdict:
        """Read the sums, after the exchange of `bucket`."""
        values = self.bucket.target.tolist()
        flags, seconds = values[HEAD : HEAD + self._world_size], values[HEAD + self._world_size :]
        bad = [rank for rank, flag in enumerate(flags) if flag > 0]
        loss = math.nan if bad else values[LOSS]
        return Verdict(loss, bad, values[STOP] > 0, values[TURN] == self._world_size, values[COLD] > 0, seconds)
