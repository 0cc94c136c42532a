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
from shoal.engine.exchange.backup import StepDropped
from shoal.engine.exchange.gradients import GradientExchange
from shoal.engine.forward import Forward
from shoal.engine.layout.replica import Replica
from shoal.engine.memory import give_back, is_out_of_memory
from shoal.events import EventLog


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
        total, (stop, save, stay) = self._replica.agree(total, [ballot.stop, ballot.save, not ballot.turn])
        exchange.before_last_backward(total, dataclasses.replace(ballot, stop=stop, save=save, turn=not stay))


class Droppable:
    """Computes as another does, until it hears that the others have taken the step without this rank."""

    def __init__(self, computation: Direct, replica: Replica) -> None:
        self._computation = computation
        self._replica = replica

    def backward(self, batch: Batch, exchange: ReplicaExchange, ballot: Callable[[], Ballot]) -> None:
        """The gradient, or what there is of it."""
        try:
            self._computation.backward(batch, exchange, ballot)
        except StepDropped:
            self._replica.clear_gradients()


class Forgiving:
    """Computes as another does. Out of memory, it gives the step up, together with all ranks, and not the run."""

    def __init__(self, computation: Direct, replica: Replica, log: EventLog) -> None:
        self._computation = computation
        self._replica = replica
        self._log = log

    def backward(self, batch: Batch, exchange: ReplicaExchange, ballot: Callable[[], Ballot]) -> None:
        """The gradient, or this rank's word that there is none."""
        try:
            self._computation.backward(batch, exchange, ballot)
            return
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            message = str(error).partition("\n")[0]
        # Only here: while the error is handled, its traceback holds all that forward has made.
        self._replica.clear_gradients()
        give_back()
        assert isinstance(exchange, GradientExchange), "steps are given up only where all ranks commit together"
        exchange.give_up()
        self._log.write(
            "out_of_memory", epoch=batch.cursor.epoch, first=batch.first, samples=batch.share, message=message
        )
