"""One step's exchange on one rank: gradients and agreement, from the first backward to the optimizer."""

from __future__ import annotations

import functools
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor, nn

from shoal.engine.agreement import Agreement, Verdict
from shoal.engine.buckets import GradientBuckets
from shoal.engine.clipping import clip
from shoal.engine.communicator import Lane
from shoal.errors import JobError
from shoal.ops import NODE, WORLD
from shoal.strategy.bucket import Bucket
from shoal.strategy.sync.allreduce import AllReduceSync
from shoal.wire.transport import Memory, Transport

_BYTES_PER_MB = 1_000_000


class GradientExchange:
    """Runs a sync for every step of training.

    Called in this order each step: `begin`, `before_backward` for each micro-batch but the last, `before_last_backward`
    (also where there is no micro-batch), `finish`, `clip`, `install`, then the optimizer, then `release`.
    """

    def __init__(
        self,
        model: nn.Module,
        sync: AllReduceSync,
        lanes: list[dict[str, Transport]],
        device: torch.device,
        rank: int,
        world_size: int,
        bucket_mb: float,
    ) -> None:
        """Lay out the buckets of `model`'s gradients; collective.

        Args:
            lanes: for each lane its transports by group; they belong to this object from now on. Buckets go to lanes
                in turn; everything else takes the first.
        """
        self._sync = sync
        self._lanes = [Lane(transports, device) for transports in lanes]
        self._group = NODE if sync.hierarchical else WORLD
        self._buckets = GradientBuckets(
            model.named_parameters(), int(bucket_mb * _BYTES_PER_MB), self._allocate, self._send
        )
        allocate = functools.partial(self._allocate, 0)
        self._agreement = Agreement(rank, world_size, allocate)
        self._square = Bucket.over("clipping", allocate(1, torch.float64), 1)
        self._in_flight: list[tuple[Lane, Future[Any]]] = []
        self._fence: Future[Any] | None = None

    @property
    def bytes_sent(self) -> int:
        """Payload bytes that this rank has put on the network so far."""
        return sum(lane.bytes_sent for lane in self._lanes)

    def begin(self) -> None:
        """A new step."""
        self._buckets.begin()

    def before_backward(self) -> None:
        """Call before each micro-batch's backward."""
        self._pass_fence()

    def before_last_backward(self, weighted_loss: Tensor, *, stop: bool) -> None:
        """Call before the last micro-batch's backward: from now on buckets leave as they fill.

        Args:
            weighted_loss: this rank's part of the global mean loss, a scalar.
            stop: this rank asks to stop after this step.
        """
        self._pass_fence()
        self._agreement.propose(weighted_loss, stop=stop)
        first = self._lanes[0]
        self._in_flight.append((first, first.submit(self._sync.exchange_exact(self._agreement.bucket))))
        self._buckets.begin_last_backward()

    def finish(self) -> Verdict:
        """Send what is left, wait for everything, and return what the ranks agreed on."""
        self._buckets.end_last_backward()
        for lane, future in self._in_flight:
            lane.wait(future)
        self._in_flight.clear()
        return self._agreement.read()

    def clip(self, max_norm: float) -> float:
        """Scale the reduced gradients down to `max_norm`; return their norm before that."""
        exchange = clip(self._buckets.buckets, max_norm, self._square, shared=self._sync.hierarchical)
        return float(self._lanes[0].wait(self._lanes[0].submit(exchange)))

    def install(self) -> None:
        """Make the reduced gradients the parameters' `grad`.

        Raises:
            JobError: no rank had a gradient for anything.
        """
        if self._buckets.install() == 0:
            raise JobError(
                "no parameter got a gradient on any rank; expected a loss that depends on the model's parameters: is "
                "it computed under torch.no_grad, or from detached tensors?"
            )

    def release(self) -> None:
        """This rank has read its gradients: the memory may be written again once all ranks say so."""
        self._fence = self._lanes[0].submit(self._sync.fence())

    def close(self) -> None:
        """End the communication threads and their transports."""
        self._buckets.close()
        for lane in self._lanes:
            lane.close()

    def _lane_of(self, index: int) -> Lane:
        return self._lanes[index % len(self._lanes)]

    def _allocate(self, index: int, num_values: int, dtype: torch.dtype) -> Memory:
        return self._lane_of(index).transports[self._group].allocate(num_values, dtype)

    def _send(self, index: int, bucket: Bucket) -> None:
        lane = self._lane_of(index)
        self._in_flight.append((lane, lane.submit(self._sync.exchange(bucket))))

    def _pass_fence(self) -> None:
        if self._fence is not None:
            self._lanes[0].wait(self._fence)
            self._fence = None
