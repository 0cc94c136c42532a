"""A job's loss where the model runs as a pipeline: in training with its gradients, in validation without."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from shoal.data.loader import Batch
from shoal.engine.exchange import ReplicaExchange
from shoal.engine.exchange.agreement import Ballot
from shoal.engine.forward import Forward, to_device
from shoal.engine.layout.pipeline.line import Line
from shoal.engine.layout.pipeline.trace import Playback, Traced, call_of
from shoal.engine.layout.replica import Replica


class PipelinedForward(Forward):
    """Computes a job's loss on one batch, over all ranks of a pipeline."""

    def __init__(self, forward: Forward, line: Line, traced: Traced) -> None:
        self.__dict__ |= forward.__dict__
        self._line = line
        self._traced = traced

    def __call__(self, samples: Any) -> tuple[Tensor, Any, Any]:
        """Return (mean loss, outputs, samples on the device); the first two on the last stage, elsewhere 0 and None."""
        moved = to_device(samples, self.device)
        found: list[tuple[Tensor, Any]] = []

        def score(outputs: Any, _: int) -> Tensor:
            loss, given = self.loss_of(Playback(outputs), moved)
            found.append((loss, given))
            return loss

        self._line.run([self.inputs(moved)], score, train=False)
        if not found:
            return torch.zeros(()), None, moved
        return found[0][0].detach(), found[0][1], moved

    @property
    def has_outputs(self) -> bool:
        """Whether this rank has the last stage."""
        return self._line.is_last

    def inputs(self, moved: Any) -> Mapping[str, Any]:
        """What the job's loss calls the model with, by the names of its arguments."""
        return self._traced.inputs(call_of(self.loss, moved))


class Pipelined:
    """Computes gradients over all ranks of a pipeline."""

    def __init__(self, forward: PipelinedForward, line: Line, replica: Replica) -> None:
        self._forward = forward
        self._line = line
        self._replica = replica

    def backward(self, batch: Batch, exchange: ReplicaExchange, ballot: Callable[[], Ballot]) -> None:
        """All micro-batches of one size together; what is left in an epoch's last batch may be smaller."""
        exchange.before_backward()
        denominator, device = exchange.denominator(batch), self._forward.device
        total = torch.zeros((), dtype=torch.float64)
        for count in sorted({count for count, _ in batch.micro_batches}, reverse=True):
            moved = [to_device(samples, device) for size, samples in batch.micro_batches if size == count]

            def score(outputs: Any, number: int, count: int = count, moved: list[Any] = moved) -> Tensor:
                loss, _ = self._forward.loss_of(Playback(outputs), moved[number])
                return loss * (count / denominator)

            scores = self._line.run([self._forward.inputs(samples) for samples in moved], score, train=True)
            total += sum(float(value) for value in scores)
        own = ballot()
        loss, (stop, save) = self._replica.agree(total, [own.stop, own.save])
        self._replica.finish_backward()
        exchange.before_last_backward(loss, dataclasses.replace(own, stop=stop, save=save))
