"""One step's exchange on one rank: gradients and agreement, from the first backward to the optimizer."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor, nn

from shoal.engine.agreement import Agreement, Verdict
from shoal.engine.buckets import GradientBuckets
from shoal.engine.clipping import clip
from shoal.engine.communicator import Communicator
from shoal.ops import NODE, WORLD
from shoal.strategy.bucket import Bucket
from shoal.strategy.sync.allreduce import AllReduceSync
from shoal.wire.transport import Transport

_BYTES_PER_MB = 1_000_000


class GradientExchange:
    """Runs a sync for every step of training.

    Called in this order each step: `begin`, `before_backward` for each micro-batch, `finish`, `clip`, `install`, then
    the optimizer, then `release`.
    """

    def __init__(
        self,
        model: nn.Module,
        sync: AllReduceSync,
        transports: dict[str, Transport],
        device: torch.device,
        rank: int,
        world_size: int,
        bucket_mb: float,
    ) -> None:
        """Lay out the buckets of `model`'s gradients; the transports belong to this object from now on. Collective."""
        self._sync = sync
        self._communicator = Communicator(transports, device)
        allocate = transports[NODE if sync.hierarchical else WORLD].allocate
        self._buckets = GradientBuckets(model.named_parameters(), int(bucket_mb * _BYTES_PER_MB), allocate, self._send)
        self._agreement = Agreement(rank, world_size, self._buckets.num_parameters, allocate)
        square = allocate(1, torch.float64)
        self._square = Bucket("clipping", square.source, square.target, square.portion)
        self._in_flight: list[Future[Any]] = []
        self._fence: Future[Any] | None = None

    @property
    def bytes_sent(self) -> int:
        """Payload bytes that this rank has put on the network so far."""
        return self._communicator.bytes_sent

    def begin(self) -> None:
        """A new step."""
        self._buckets.begin()

    def before_backward(self, *, last: bool) -> None:
        """Call before each micro-batch's backward; in the last one buckets leave as they fill."""
        self._pass_fence()
        if last:
            self._buckets.begin_last_backward()

    def finish(self, weighted_loss: Tensor, *, stop: bool, idle: bool) -> Verdict:
        """Send what is left, wait for everything, and return what the ranks agreed on.

        Args:
            weighted_loss: this rank's part of the global mean loss, a scalar.
            stop: this rank asks to stop after this step.
            idle: this rank had no samples, so `before_backward` was not called.
        """
        if idle:
            self.before_backward(last=True)
        used = self._buckets.end_last_backward()
        self._agreement.propose(weighted_loss.item(), used, stop=stop)
        self._in_flight.append(self._communicator.submit(self._sync.exchange_exact(self._agreement.bucket)))
        for future in self._in_flight:
            self._communicator.wait(future)
        self._in_flight.clear()
        return self._agreement.read()

    def clip(self, max_norm: float) -> float:
        """Scale the reduced gradients down to `max_norm`; return their norm before that."""
        exchange = clip(self._buckets.buckets, max_norm, self._square, shared=self._sync.hierarchical)
        return float(self._communicator.wait(self._communicator.submit(exchange)))

    def install(self, verdict: Verdict) -> None:
        """Make the reduced gradients the parameters' `grad`."""
        self._buckets.install(verdict.used)

    def release(self) -> None:
        """This rank has read its gradients: the memory may be written again once all ranks say so."""
        self._fence = self._communicator.submit(self._sync.fence())

    def close(self) -> None:
        """End the communication thread and its transports."""
        self._buckets.close()
        self._communicator.close()

    def _send(self, bucket: Bucket) -> None:
        self._in_flight.append(self._communicator.submit(self._sync.exchange(bucket)))

    def _pass_fence(self) -> None:
        if self._fence is not None:
            self._communicator.wait(self._fence)
            self._fence = None
