"""The agreement for syncs whose ranks do not wait for each other in every step.

Every few steps the vector leaves in the background, and is read the same number of steps later, on every rank at the
same step: so all still decide alike, and nobody waits for a slow link.
"""

from __future__ import annotations

import dataclasses
import math
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from shoal.engine.exchange.agreement import Agreement, Ballot, Verdict
from shoal.engine.exchange.communicator import Lane
from shoal.strategy.agreement import EVERY
from shoal.strategy.sync.summation import Summation


class LaggedAgreement:
    """An agreement that is some steps old when it is read."""

    def __init__(self, agreement: Agreement, lane: Lane, sync: Summation, rank: int) -> None:
        self._agreement = agreement
        self._lane = lane
        self._sync = sync
        self._rank = rank
        self._pending: Future[Any] | None = None
        self._loss = math.nan
        self._verdict = Verdict(math.nan, [], stop=False)

    def propose(self, step: int, loss: Tensor, weighted_loss: Tensor, ballot: Ballot) -> None:
        """Take part in step `step`, counted from 0. `loss`: this rank's own mean; see `Agreement.propose`."""
        self._loss = float(loss)
        self._verdict = Verdict(self._loss, [] if math.isfinite(self._loss) else [self._rank], stop=False)
        if step % EVERY:
            return
        if self._pending is not None:
            agreed = self._read()
            bad = sorted({*agreed.non_finite_ranks, *self._verdict.non_finite_ranks})
            self._verdict = dataclasses.replace(agreed, loss=self._loss, non_finite_ranks=bad)
        self._agreement.propose(weighted_loss.to(torch.float64), ballot)
        self._pending = self._lane.submit(self._sync.exchange_exact(self._agreement.bucket))

    def verdict(self) -> Verdict:
        """This rank's own loss, and what was agreed on in the meantime."""
        return self._verdict

    def drain(self) -> None:
        """Wait for what is on its way and forget it."""
        if self._pending is not None:
            self._read()

    def _read(self) -> Verdict:
        assert self._pending is not None
        self._lane.wait(self._pending)
        agreed = self._agreement.read()
        self._lane.wait(self._lane.submit(self._sync.fence()))
        self._pending = None
        return agreed
