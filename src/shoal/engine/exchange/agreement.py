"""What all ranks must know about a step before it counts: a few numbers, summed exactly while backward runs.

They carry the loss, a flag for each rank whose loss is not finite, votes, and how long each rank took for its data and
for computing. Every rank reads the same sums, so all decide alike. They leave before the gradients: behind them they
would wait in the queues of a slow link. What becomes known later, that a rank ran out of memory in backward, is a flag
of the gradients' own; whose it was is asked in a second round, which only such a step has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shoal.strategy.agreement import COLD, COMPUTE_S, DATA_S, FLAG, LOSS, SAVE, STOP, TURN, agreement_bucket, row
from shoal.wire.transport import Memory


@dataclass(frozen=True)
class Ballot:
    """What one rank puts to the others.

    Attributes:
        stop: it asks to stop after this step.
        turn: it is ready for the next view.
        cold: it has no state yet, and takes part without a share.
        save: it asks for a checkpoint after this step.
        data_s, compute_s: how long it waited for its samples of the step before, and computed on them, waiting for
            other ranks left out; 0: it does not know.
    """

    stop: bool = False
    turn: bool = False
    cold: bool = False
    save: bool = False
    data_s: float = 0.0
    compute_s: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """What the step came to, the same on every rank.

    Attributes:
        loss: the mean over the global batch.
        non_finite_ranks: ranks whose own loss was NaN or infinite.
        stop: somebody asked to stop after this step.
        turn: all are ready for the next view, and turn to it after this step.
        cold: somebody has no state yet.
        save: somebody asked for a checkpoint after this step.
        data_s, compute_s: each rank's own, of the step before; empty: nobody said.
        short_ranks: ranks that ran out of memory; if there are any, the step did not happen and all else is void.
    """

    loss: float
    non_finite_ranks: list[int]
    stop: bool
    turn: bool = False
    cold: bool = False
    save: bool = False
    data_s: list[float] = field(default_factory=list)
    compute_s: list[float] = field(default_factory=list)
    short_ranks: list[int] = field(default_factory=list)


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
        part[COLD], part[SAVE] = float(ballot.cold), float(ballot.save)
        self._own(FLAG)[...] = finite.logical_not()
        self._own(DATA_S)[...] = ballot.data_s
        self._own(COMPUTE_S)[...] = ballot.compute_s

    def read(self) -> Verdict:
        """Read the sums, after the exchange of `bucket`."""
        values = self.bucket.target.tolist()
        bad, data_s, compute_s = self.flagged(), values[self._row(DATA_S)], values[self._row(COMPUTE_S)]
        return Verdict(
            loss=math.nan if bad else values[LOSS],
            non_finite_ranks=bad,
            stop=values[STOP] > 0,
            turn=values[TURN] == self._world_size,
            cold=values[COLD] > 0,
            save=values[SAVE] > 0,
            data_s=data_s,
            compute_s=compute_s,
        )

    def propose_flag(self, value: bool) -> None:
        """Write nothing but this rank's flag: the question of the round says what it means."""
        self.bucket.source.zero_()
        self._own(FLAG)[...] = float(value)

    def flagged(self) -> list[int]:
        """The ranks that have set their flag, after the exchange of `bucket`."""
        flags = self.bucket.target[self._row(FLAG)].tolist()
        return [rank for rank, flag in enumerate(flags) if flag > 0]

    def _row(self, index: int) -> slice:
        return row(index, self._world_size)

    def _own(self, index: int) -> Tensor:
        return self.bucket.source[self._row(index)][self._rank]
