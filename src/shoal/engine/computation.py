"""Forward and backward of one rank's samples, and when the exchange hears of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from shoal.data.loader import Batch
from shoal.engine.exchange import ReplicaExchange
from shoal.engine.exchange.agreement import Ballot
from shoal.engine.forward import Forward
from shoal.engine.layout.replica import Replica


class Computation(Protocol):
    """Computes gradients."""

    def backward(self, batch: Batch, exchange: ReplicaExchange, ballot: Callable[[], Ballot]) -> None:
        """Accumulate the gradient of this rank's samples, and start to exchange it."""


class Direct:
    """The whole of the model's forward runs on this rank; autograd runs backward."""

    def __init__(self, forward: Forward, replica: Replica) -> None:
        self._forward = forward
        self._replica = replica

    def backward(self, batch: Batch, exchange: ReplicaExchange, ballot: Callable[[], Ballot]) -> None:
        """One micro-batch after the other; buckets leave during the last one's backward."""
        total = torch.zeros(())
        denominator = exchange.denominator(batch)
        last = len(batch.micro_batches) - 1
        for index, (count, samples) in enumerate(batch.micro_batches):
            loss, _, _ = self._forward(samples)
            part = loss * (count / denominator)
            total = total.to(part.device) + part.detach()
            if index == last:
                self._announce(total, exchange, ballot())
            else:
                exchange.before_backward()
            if part.requires_grad:  # samples that touch no trainable parameter add nothing; another rank's may
                part.backward()
        if not batch.micro_batches:
            self._announce(total, exchange, ballot())
        self._replica.finish_backward()

    def _announce(self, total: Tensor, exchange: ReplicaExchange, ballot: Ballot) -> None:
        total, stop = self._replica.agree(total, stop=ballot.stop)
        exchange.before_last_backward(total, dataclasses.replace(ballot, stop=stop))
