"""Local steps on one rank: train alone, let fragments of what was learned leave in the background, merge them later."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shoal.data.loader import Batch
from shoal.engine.exchange import parameters
from shoal.engine.exchange.agreement import Agreement, Ballot, Verdict
from shoal.engine.exchange.base import OnLanes, Wiring, copied
from shoal.engine.exchange.clipping import require_gradients
from shoal.engine.exchange.lagged import LaggedAgreement
from shoal.engine.exchange.parameters import Section
from shoal.ops import NODE, WORLD
from shoal.strategy.bucket import Bucket
from shoal.strategy.codec.feedback import Coder
from shoal.strategy.flat import bucket_bytes
from shoal.strategy.sync.local import (
    MEASURED_STEPS,
    TIMED_EXCHANGES,
    LocalSync,
    Rhythm,
    least_every,
    num_fragments,
    outer_step,
    rhythm,
)
from shoal.wire.transport import Memory


@dataclass
class _Part:
    """One section on its way between ranks.

    Attributes:
        anchor: the values that all ranks agreed on last, shape (n,).
        sent: this rank's values when the difference left.
        momentum: the outer optimizer's; None without.
    """

    section: Section
    bucket: Bucket
    anchor: Tensor
    sent: Tensor
    momentum: Tensor | None


@dataclass
class _Fragment:
    """Parts that leave together, and the samples since they last did: this rank's and everybody's."""

    parts: list[_Part]
    own_samples: int = 0
    all_samples: int = 0
    pending: list[Future[Any]] | None = None
    arrived: list[Tensor] | None = None


class LocalExchange(OnLanes):
    """Runs `LocalSync`."""

    asynchronous = False
    replicas_equal = False

    def __init__(self, wiring: Wiring, sync: LocalSync, coder: Coder | None) -> None:
        """Lay the model out in fragments, all of it the anchor. Collective."""
        self._wiring, self._sync, self._config, self._coder = wiring, sync, sync.config, coder
        super().__init__(wiring)
        self._group = NODE if sync.hierarchical else WORLD
        rank, world_size = wiring.topology.rank, wiring.topology.world_size
        agreement = Agreement(rank, world_size, lambda n, dtype: self._allocate(0, n, dtype))
        self._agreement = LaggedAgreement(agreement, self._lanes[0], sync, rank)
        laid = parameters.lay_out(wiring.replica, num_fragments(sync.config), bucket_bytes(sync.config.bucket_mb))
        self._fragments = [_Fragment([self._part(section) for section in sections]) for sections in laid]
        self._parts = [part for fragment in self._fragments for part in fragment.parts]
        self._fence: Future[Any] | None = None
        self._step = self._base = 0
        self._measured_s: list[float] = []
        self._last_t = time.perf_counter()
        self._exchange_s = 0.0
        self._rhythm: Rhythm | None = None
        if sync.config.every != "auto":
            self._settle(sync.config.every)

    def denominator(self, batch: Batch) -> float:
        """This rank's own samples: it trains by itself."""
        return max(batch.replica_share, 1)

    def begin(self, batch: Batch, clock: int) -> None:
        """Count the samples, which are the weights of the next averages."""
        self._wiring.replica.clear_gradients()
        self._weight = batch.replica_share / batch.size
        for fragment in self._fragments:
            fragment.own_samples += batch.replica_share
            fragment.all_samples += batch.size

    def before_backward(self) -> None:
        """Nothing is exchanged during backward."""

    def before_last_backward(self, loss: Tensor, ballot: Ballot) -> None:
        """Take part in the agreement, if it is due."""
        self._agreement.propose(self._step, loss, loss * self._weight, ballot)

    def finish(self) -> Verdict:
        """Nothing to wait for."""
        return self._agreement.verdict()

    def clip(self, max_norm: float) -> float:
        """Clip this rank's own gradient."""
        return self._wiring.replica.clip(max_norm)

    def install(self) -> None:
        """The gradients are where autograd put them."""
        if self._weight:
            require_gradients(self._wiring.replica)

    def release(self) -> None:
        """Merge what is due, and let leave what is due."""
        self._step += 1
        if self._rhythm is None:
            self._measure()
            return
        step, overlaps = self._step - self._base, self._rhythm.overlap > 0
        if overlaps:
            self._merge(self._rhythm.merging(step))
        self._leave(self._rhythm.leaving(step))
        if not overlaps:
            self._merge(self._rhythm.merging(step))

    @contextmanager
    def consensus(self) -> Iterator[None]:
        """The anchor is what all ranks agree on."""
        sections, anchors = [part.section for part in self._parts], [part.anchor for part in self._parts]
        with parameters.holding(self._wiring.replica, sections, anchors):
            yield

    def conclude(self) -> bool:
        """Merge what is on its way, then average everything once more, without momentum."""
        self._agreement.drain()
        everything = list(range(len(self._fragments)))
        self._merge([f for f in everything if self._fragments[f].pending or self._fragments[f].arrived])
        self._leave(everything, exact=True)
        for fragment in self._fragments:
            for part, difference in zip(fragment.parts, self._differences(fragment), strict=True):
                part.anchor.sub_(difference)
                part.section.values.copy_(part.anchor)
        self._pass_fence(begin=True)
        return True

    def model_state(self) -> dict[str, Any]:
        """The model with the anchor's values."""
        with self.consensus():
            state: dict[str, Any] = self._wiring.replica.state_dict()
            return state

    def state_dict(self) -> dict[str, Any]:
        """This rank's own values, what is on its way, and the rhythm."""
        for fragment in self._fragments:
            if fragment.pending is not None:
                fragment.arrived = [difference.clone() for difference in self._differences(fragment)]
        return {
            "step": self._step,
            "base": self._base,
            "every": self._rhythm.every if self._rhythm else 0,
            "samples": [(fragment.own_samples, fragment.all_samples) for fragment in self._fragments],
            "values": copied([part.section.values for part in self._parts]),
            "sent": copied([part.sent for part in self._parts]),
            "momentum": copied([part.momentum for part in self._parts]),
            "arrived": copied([fragment.arrived for fragment in self._fragments]),
            "coder": copied(self._coder.state_dict()) if self._coder else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`'s value; the model holds the anchor."""
        self._step, self._base = state["step"], state["base"]
        if state["every"]:
            self._rhythm = rhythm(self._config, state["every"], len(self._fragments))
        for part, values, sent, momentum in zip(
            self._parts, state["values"], state["sent"], state["momentum"], strict=True
        ):
            part.section.values.copy_(values)
            part.sent.copy_(sent)
            if part.momentum is not None:
                part.momentum.copy_(momentum)
        for fragment, samples, arrived in zip(self._fragments, state["samples"], state["arrived"], strict=True):
            fragment.own_samples, fragment.all_samples = samples
            fragment.arrived = arrived
        if self._coder is not None and state["coder"] is not None:
            self._coder.load_state_dict(state["coder"])

    def _part(self, section: Section) -> _Part:
        memory = self._allocate(1, len(section.values), section.values.dtype)
        bucket = Bucket.over(section.name, memory, len(section.values), section.pieces)
        momentum = torch.zeros_like(section.values) if self._config.outer_momentum else None
        return _Part(section, bucket, section.values.clone(), section.values.clone(), momentum)

    def _allocate(self, lane: int, num_values: int, dtype: torch.dtype) -> Memory:
        return self._lanes[lane].transports[self._group].allocate(num_values, dtype)

    def _leave(self, fragments: list[int], *, exact: bool = False) -> None:
        """Let differences leave; the exchange runs in the background."""
        exchange = self._sync.exchange_exact if exact else self._sync.exchange
        for fragment in (self._fragments[f] for f in fragments):
            self._pass_fence()
            weight = fragment.own_samples / max(fragment.all_samples, 1)
            fragment.own_samples = fragment.all_samples = 0
            fragment.pending = []
            for part in fragment.parts:
                part.sent.copy_(part.section.values)
                torch.sub(part.anchor, part.sent, out=part.bucket.source)
                part.bucket.source.mul_(weight)
                fragment.pending.append(self._lanes[1].submit(exchange(part.bucket)))

    def _merge(self, fragments: list[int]) -> None:
        """Take in mean differences: move the anchor, and put this rank's own steps since then on it."""
        assert self._rhythm is not None or not fragments
        for fragment in (self._fragments[f] for f in fragments):
            for part, difference in zip(fragment.parts, self._differences(fragment), strict=True):
                outer_step(part.anchor, difference, part.momentum, self._config)
                if self._rhythm is None or self._rhythm.overlap == 0:
                    part.section.values.copy_(part.anchor)
                elif self._config.merge == "carry":
                    part.section.values.sub_(part.sent).add_(part.anchor)
                else:
                    part.section.values.lerp_(part.anchor, 0.5)
            self._pass_fence(begin=True)

    def _differences(self, fragment: _Fragment) -> list[Tensor]:
        """The mean differences of a fragment that has left; waits for them."""
        if fragment.arrived is not None:
            arrived, fragment.arrived, fragment.pending = fragment.arrived, None, None
            return arrived
        assert fragment.pending is not None
        for future in fragment.pending:
            self._lanes[1].wait(future)
        fragment.pending = None
        return [part.bucket.target for part in fragment.parts]

    def _pass_fence(self, *, begin: bool = False) -> None:
        """Shared memory is written again only when all ranks of the node have read it."""
        if self._fence is not None:
            self._lanes[1].wait(self._fence)
            self._fence = None
        if begin and self._sync.hierarchical:
            self._fence = self._lanes[1].submit(self._sync.fence())

    def _measure(self) -> None:
        """Time the first steps and one exchange, and settle how often to exchange. Collective at the last of them."""
        now = time.perf_counter()
        if self._step in MEASURED_STEPS:
            self._measured_s.append(now - self._last_t)
        self._last_t = now
        if self._step < MEASURED_STEPS.stop - 1:
            return
        self._base = self._step
        exchange_s = self._time_exchange()
        step_s = sorted(self._measured_s)[len(self._measured_s) // 2]
        rank, world_size = self._wiring.topology_of_all.rank, self._wiring.topology_of_all.world_size
        own = [0.0] * (2 * world_size)
        own[rank], own[world_size + rank] = step_s, exchange_s
        told = self._wiring.world.sum(own)
        self._settle(least_every(max(told[world_size:]), max(told[:world_size]), len(self._fragments)))

    def _time_exchange(self) -> float:
        """Exchange the largest fragment, and return the seconds that the whole model would take.

        Twice: the first one waits for the slowest rank and for fresh memory, the second one is timed.
        """
        sizes = [sum(part.bucket.num_values for part in fragment.parts) for fragment in self._fragments]
        largest = sizes.index(max(sizes))
        started = time.perf_counter()
        for _ in range(TIMED_EXCHANGES):
            started = time.perf_counter()
            self._leave([largest])
            fragment = self._fragments[largest]
            for part, difference in zip(fragment.parts, self._differences(fragment), strict=True):
                part.anchor.sub_(difference)
                part.section.values.copy_(part.anchor)
            self._pass_fence(begin=True)
        return (time.perf_counter() - started) * sum(sizes) / max(max(sizes), 1)

    def _settle(self, every: int) -> None:
        self._rhythm = rhythm(self._config, every, len(self._fragments))
        if self._wiring.topology_of_all.rank == 0:
            self._wiring.log.write("rhythm", every=every, fragments=len(self._fragments), overlap=self._rhythm.overlap)
