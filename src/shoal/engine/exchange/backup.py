"""Gradients summed in every step, but not waiting for the slowest k ranks.

A step commits when all ranks but k have their gradient, and the others had a little longer (Chen et al. 2016,
"Revisiting distributed synchronous SGD", call the surplus ranks backup workers). Who is late takes part with zeros, is
told so in the midst of its computing, and goes on with the step that the others took. The sum is divided by the samples
that are in it, so it is the exact mean over them; what was dropped is counted and logged, never silent.

How long "a little" is follows from measured arrivals: a part of the steps' own median time. Nothing is decided in one
place: each rank's communication thread looks whether this rank's gradient is there when enough others' are.
"""

from __future__ import annotations

import dataclasses
import statistics
import threading
import time
from collections import deque
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from shoal.data.loader import Batch
from shoal.engine.exchange.agreement import Ballot, Verdict
from shoal.engine.exchange.base import Wiring
from shoal.engine.exchange.clipping import scale
from shoal.engine.exchange.gradients import GradientExchange
from shoal.errors import PeerLostError
from shoal.ops import Exchange
from shoal.strategy.bucket import Bucket
from shoal.strategy.codec.feedback import Coder
from shoal.strategy.sync.allreduce import AllReduceSync

_SLICE = timedelta(milliseconds=50)
_LEAST_GRACE_S = 1e-3
_REMEMBERED = 20


class StepDropped(Exception):  # noqa: N818 - it is news, and no error
    """The others have taken this step without this rank: raised in the midst of its forward or backward."""


class BackupExchange(GradientExchange):
    """Runs `AllReduceSync` with `backup` ranks to spare."""

    def __init__(self, wiring: Wiring, sync: AllReduceSync, coder: Coder | None) -> None:
        """As for `GradientExchange`; buckets leave after backward, since until then nobody knows who takes part."""
        super().__init__(wiring, sync, coder)
        self._buckets.close()
        self._wiring = wiring
        self._store = wiring.world.store.clone()  # type: ignore[attr-defined]  # a client waits with its lock held
        self._world_size = wiring.topology.world_size
        self._needed = max(1, self._world_size - sync.config.backup)
        self._contributed = Bucket.over("contributed", self._allocate(0, 1, torch.float64), 1)
        self._durations: deque[float] = deque(maxlen=_REMEMBERED)
        self._lock = threading.Lock()
        self._serial = 0
        self._is_ready = self._is_decided = self._is_late = False
        self._loss, self._ballot = torch.zeros(()), Ballot()
        self._watched: list[Any] = [
            module.register_forward_pre_hook(lambda *_: self._check()) for module in wiring.replica.model.modules()
        ] + [held.owner.register_post_accumulate_grad_hook(lambda _: self._check()) for held in wiring.replica.held]

    def begin(self, batch: Batch, clock: int) -> None:
        """A new step: from now on the communication thread takes part in it, with this rank's gradient or without."""
        super().begin(batch, clock)
        self._serial += 1
        self._batch, self._began = batch, time.perf_counter()
        self._is_ready = self._is_decided = self._is_late = False
        self._loss, self._ballot = torch.zeros(()), Ballot()
        lane = self._lanes[0]
        self._in_flight.append((lane, lane.submit(self._take_part(self._serial))))

    def before_backward(self) -> None:
        """Gradients gather in memory of their own."""

    def before_last_backward(self, loss: Tensor, ballot: Ballot) -> None:
        """Remember what this rank has to say, if it comes in time."""
        self._loss, self._ballot = loss, ballot

    def finish(self) -> Verdict:
        """Hand the gradient in, unless it is too late; wait for the others; divide by the samples that are there."""
        self._hand_in()
        for lane, future in self._in_flight:
            lane.wait(future)
        self._in_flight.clear()
        self._durations.append(time.perf_counter() - self._began)
        if self._is_late and self._batch.share:
            self._wiring.log.write(
                "gradient_dropped", epoch=self._batch.cursor.epoch, first=self._batch.first, samples=self._batch.share
            )
        return self._weighted(self._agreement.read())

    def close(self, *, wait: bool = False) -> None:
        """End the communication threads and their transports."""
        for hook in self._watched:
            hook.remove()
        super().close(wait=wait)

    def _weighted(self, verdict: Verdict) -> Verdict:
        contributed = float(self._contributed.target)
        factor = self._batch.size / contributed
        if factor != 1:
            lane = self._lanes[0]
            lane.wait(lane.submit(scale(self._buckets.buckets, factor, shared=self._shared)))
        return dataclasses.replace(verdict, loss=verdict.loss * factor)

    def _hand_in(self) -> None:
        """This rank's gradient is complete."""
        self._pass_fence()
        with self._lock:
            if self._is_decided:
                return
            self._buckets.begin_last_backward()
            self._buckets.end_last_backward()
            self._agreement.propose(self._loss, self._ballot)
            self._contributed.source.fill_(float(self._batch.share))
            self._is_ready = True
        place = self._wiring.world.store.add(_key(self._serial, "ready"), 1)
        if place == self._needed:
            self._wiring.world.store.set(_key(self._serial, "enough"), "")
        if place == self._world_size:
            self._wiring.world.store.set(_key(self._serial, "all"), "")

    def _send(self, index: int, bucket: Bucket) -> None:
        """Not yet: the buckets are only filled."""

    def _take_part(self, serial: int) -> Exchange:
        """The exchange of one step, on the communication thread."""
        self._await_enough(serial)
        with self._lock:
            self._is_decided, self._is_late = True, not self._is_ready
            if self._is_late:
                for bucket in (*self._buckets.buckets, self._contributed):
                    bucket.source.zero_()
                self._agreement.propose(torch.zeros(()), Ballot())
        yield from self._sync.exchange_exact(self._contributed)
        yield from self._sync.exchange_exact(self._agreement.bucket)
        for bucket in self._buckets.buckets:
            yield from self._sync.exchange(bucket)

    def _await_enough(self, serial: int) -> None:
        while not self._wait_for(_key(serial, "enough"), _SLICE):
            if self._wiring.world.is_cut:
                raise PeerLostError("the view was cut while this rank waited for the others' gradients")
        grace_s = self._sync.config.backup_grace * statistics.median(self._durations or [0.0])
        self._wait_for(_key(serial, "all"), timedelta(seconds=max(grace_s, _LEAST_GRACE_S)))

    def _wait_for(self, key: str, timeout: timedelta) -> bool:
        try:
            self._store.wait([key], timeout)
            return True
        except RuntimeError:
            return False

    def _check(self) -> None:
        """Called all over forward and backward: there is no use in going on once the step was taken without us."""
        if self._is_late:
            raise StepDropped


def _key(serial: int, what: str) -> str:
    return f"backup/{serial}/{what}"
