"""A rank that takes steps by itself: nobody is asked, nobody is told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from shoal.data.loader import Batch
from shoal.engine.exchange.agreement import Ballot, Verdict
from shoal.engine.exchange.clipping import require_gradients
from shoal.engine.exchange.ledger import Ledger
from shoal.engine.layout.replica import Replica
from shoal.wire.traffic import Traffic


class Alone:
    """Local steps on this rank's parts, each as large as if the others took theirs."""

    asynchronous = False
    replicas_equal = False
    stalled_s = 0.0

    def __init__(self, replica: Replica, rank: int, num_ranks: int) -> None:
        """`rank` of `num_ranks`, among whom each batch is divided."""
        self._replica = replica
        self._rank = rank
        self._num_ranks = num_ranks
        self._weight = 0.0
        self._loss = torch.zeros(())
        self.traffic = Traffic()
        self.bytes_sent = 0

    def denominator(self, batch: Batch) -> float:
        """The mean share."""
        return batch.size / self._num_ranks

    def begin(self, batch: Batch, clock: int) -> None:
        """Forget the gradients of the step before."""
        self._replica.clear_gradients()
        self._weight = batch.replica_share / batch.size

    def before_backward(self) -> None:
        """Nothing to do."""

    def before_last_backward(self, loss: Tensor, ballot: Ballot) -> None:
        """Note the mean loss of this rank's own samples."""
        self._loss = loss / (self._weight * self._num_ranks) if self._weight else loss

    def finish(self) -> Verdict:
        """This rank's own word."""
        bad = [] if bool(torch.isfinite(self._loss)) else [self._rank]
        return Verdict(float(self._loss), bad, stop=False)

    def clip(self, max_norm: float) -> float:
        """Clip this rank's own gradient."""
        return self._replica.clip(max_norm)

    def install(self) -> None:
        """The gradients are where the optimizer looks for them."""
        if self._weight:
            require_gradients(self._replica)

    def release(self) -> None:
        """Nothing to do."""

    @contextmanager
    def consensus(self) -> Iterator[None]:
        """This rank's own values."""
        yield

    def settle(self) -> None:
        """Nothing is under way."""

    def turn(self) -> None:
        """Nobody is there."""

    def conclude(self) -> bool:
        """Nothing changes."""
        return False

    def model_state(self) -> dict[str, Any]:
        """This rank's own values."""
        state: dict[str, Any] = self._replica.state_dict()
        return state

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""

    def close(self, *, wait: bool = False) -> None:
        """Nothing to close."""


class CountedAlone(Alone):
    """The same among ranks that take local steps: each takes the mean over its own samples, and counts them."""

    def __init__(self, replica: Replica, rank: int, num_ranks: int, ledger: Ledger) -> None:
        super().__init__(replica, rank, num_ranks)
        self._ledger = ledger
        self._samples = (0, 0)

    def denominator(self, batch: Batch) -> float:
        """This rank's own samples."""
        return max(batch.replica_share, 1)

    def begin(self, batch: Batch, clock: int) -> None:
        """Forget the gradients of the step before."""
        super().begin(batch, clock)
        self._samples = (batch.replica_share, batch.size)

    def before_last_backward(self, loss: Tensor, ballot: Ballot) -> None:
        """Note the mean loss of this rank's own samples."""
        self._loss = loss

    def release(self) -> None:
        """The step counts."""
        self._ledger.count(*self._samples)
