"""Gradients summed in every step: buckets leave while backward runs, and the optimizer waits for the sums."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from shoal.data.loader import Batch
from shoal.engine.exchange.adam import CompressedAdam
from shoal.engine.exchange.agreement import Agreement, Ballot, Verdict
from shoal.engine.exchange.base import OnLanes, Wiring, copied
from shoal.engine.exchange.buckets import GradientBuckets
from shoal.engine.exchange.clipping import clip, no_gradient, scale
from shoal.engine.exchange.communicator import Lane
from shoal.ops import NODE, WORLD
from shoal.strategy.bucket import Bucket
from shoal.strategy.codec.feedback import Coder
from shoal.strategy.flat import bucket_bytes
from shoal.strategy.sync.allreduce import AllReduceSync
from shoal.wire.transport import Memory


class GradientExchange(OnLanes):
    """Runs `AllReduceSync`."""

    asynchronous = False
    replicas_equal = True

    def __init__(self, wiring: Wiring, sync: AllReduceSync, coder: Coder | None) -> None:
        """Lay out the buckets of gradients; collective. Buckets go to lanes in turn, all else to the first."""
        self._sync, self._coder, self._replica = sync, coder, wiring.replica
        super().__init__(wiring)
        self._group = NODE if sync.hierarchical else WORLD
        rank, world_size = wiring.topology.rank, wiring.topology.world_size
        allocate = functools.partial(self._allocate, 0)
        self._agreement = Agreement(rank, world_size, allocate)
        self._square = Bucket.over("clipping", allocate(1, torch.float64), 1)
        # Last: if a peer is lost meanwhile, no hook must stay behind.
        self._buckets = GradientBuckets(wiring.replica, bucket_bytes(sync.config.bucket_mb), self._allocate, self._send)
        self._adam: CompressedAdam | None = None
        if coder is not None and coder.options.variance_every and sync.codec_acts:
            self._adam = CompressedAdam(wiring.optimizer, self._buckets, coder)
        self._in_flight: list[tuple[Lane, Future[Any]]] = []
        self._fence: Future[Any] | None = None
        self._is_short = False
        self._norm = 0.0

    def denominator(self, batch: Batch) -> float:
        """The samples of all ranks: the sum of the gradients is then the mean over the global batch."""
        return batch.size

    def begin(self, batch: Batch, clock: int) -> None:
        """A new step."""
        self._buckets.begin()
        self.stalled_s = 0.0
        self._is_short = False

    def before_backward(self) -> None:
        """Call before each micro-batch's backward."""
        self._pass_fence()

    def before_last_backward(self, loss: Tensor, ballot: Ballot) -> None:
        """From now on buckets leave as they fill."""
        self._pass_fence()
        self._agreement.propose(loss, ballot)
        first = self._lanes[0]
        self._in_flight.append((first, first.submit(self._sync.exchange_exact(self._agreement.bucket))))
        self._buckets.begin_last_backward()

    def give_up(self) -> None:
        """This rank cannot compute its gradient: take part in the step nevertheless, so that all can drop it."""
        if not self._in_flight:
            self.before_last_backward(torch.zeros(()), Ballot())
        self._is_short = True
        self._buckets.spoil()

    def finish(self) -> Verdict:
        """Send what is left, wait for everything, and return what the ranks agreed on."""
        self._buckets.end_last_backward()
        for lane, future in self._in_flight:
            lane.wait(future)
        self._in_flight.clear()
        verdict = self._agreement.read()
        return self._dropped(verdict) if self._buckets.is_spoiled else verdict

    def _dropped(self, verdict: Verdict) -> Verdict:
        """Ask whose gradient was not complete. What codecs have remembered of the others' is no longer true."""
        first = self._lanes[0]
        first.wait(first.submit(self._sync.fence()))
        self._agreement.propose_flag(self._is_short)
        first.wait(first.submit(self._sync.exchange_exact(self._agreement.bucket)))
        if self._coder is not None:
            self._coder.reset()
        return dataclasses.replace(verdict, short_ranks=self._agreement.flagged())

    def clip(self, max_norm: float) -> float:
        """Scale the reduced gradients down to `max_norm`; return their norm before that."""
        if self._adam is not None and self._adam.compressed:
            return self._norm  # momentum has arrived, clipped already
        if self._replica.is_whole:
            exchange = clip(self._buckets.buckets, max_norm, self._square, shared=self._shared)
            self._norm = float(self._lanes[0].wait(self._lanes[0].submit(exchange)))
        else:
            self._norm = self._clip_divided(max_norm)
        if self._adam is not None:
            self._adam.clipped(self._norm, max_norm)
        return self._norm

    @property
    def _shared(self) -> bool:
        """Whether the ranks of a node reduce into one memory."""
        return self._sync.hierarchical and self._square.source.data_ptr() != self._square.target.data_ptr()

    def _clip_divided(self, max_norm: float) -> float:
        """The same where the reduced gradient lies in pieces over the ranks of a replica."""
        norm = math.sqrt(self._replica.square_norm(self._buckets.reduced()))
        factor = max_norm / (norm + 1e-6)
        if factor < 1:
            exchange = scale(self._buckets.buckets, factor, shared=self._shared)
            self._lanes[0].wait(self._lanes[0].submit(exchange))
        return norm

    def install(self) -> None:
        """Make the reduced gradients the parameters' `grad`.

        Raises:
            JobError: no rank had a gradient for anything.
        """
        if self._buckets.install() == 0 and self._replica.is_whole:
            raise no_gradient()

    def reduced(self) -> list[Tensor]:
        """A copy of what all ranks have summed in this step, clipped: what a newcomer needs to follow."""
        return self._buckets.copy()

    def install_reduced(self, copy: list[Tensor]) -> None:
        """As `install`, with what `reduced` gave after another step."""
        self._buckets.install_copy(copy)

    def release(self) -> None:
        """This rank has read its gradients: the memory may be written again once all ranks say so."""
        self._fence = self._lanes[0].submit(self._sync.fence())

    def consensus(self) -> AbstractContextManager[None]:
        """All replicas are equal at all times."""
        return nullcontext()

    def conclude(self) -> bool:
        """All replicas are equal at all times."""
        return False

    def model_state(self) -> dict[str, Any]:
        """The model's own."""
        state: dict[str, Any] = self._replica.state_dict()
        return state

    def state_dict(self) -> dict[str, Any]:
        """What the codec has to remember."""
        state = {"coder": copied(self._coder.state_dict())} if self._coder else {}
        return state | ({"adam": self._adam.state_dict()} if self._adam else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`'s value."""
        if self._coder is not None and state:
            self._coder.load_state_dict(state["coder"])
        if self._adam is not None and "adam" in state:
            self._adam.load_state_dict(state["adam"])

    def close(self, *, wait: bool = False) -> None:
        """End the communication threads and their transports."""
        self._buckets.close()
        if self._adam is not None:
            self._adam.close()
        super().close(wait=wait)

    def _lane_of(self, index: int) -> Lane:
        return self._lanes[index % len(self._lanes)]

    def _allocate(self, index: int, num_values: int, dtype: torch.dtype) -> Memory:
        return self._lane_of(index).transports[self._group].allocate(num_values, dtype)

    def _send(self, index: int, bucket: Bucket) -> None:
        lane = self._lane_of(index)
        self._in_flight.append((lane, lane.submit(self._sync.exchange(bucket))))

    def _pass_fence(self) -> None:
        if self._fence is not None:
            started = time.perf_counter()
            self._lanes[0].wait(self._fence)
            self.stalled_s += time.perf_counter() - started
            self._fence = None
