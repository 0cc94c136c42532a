"""Local steps on one rank: train alone, let fragments of what was learned leave in the background, merge them later.

What lasts is in the `Ledger`; this is what a view adds: connections, buckets, and what is on its way. Where ranks come
and go, a step that the optimizer has taken counts, though a rank was lost in what follows it: the loss is raised before
the next step. What has arrived by the end of a view is merged, early or not: no other rank may hold it.
"""

from __future__ import annotations

import contextlib
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
from shoal.engine.exchange.ledger import Fragment, Ledger
from shoal.engine.exchange.parameters import Section
from shoal.errors import PeerLostError
from shoal.ops import NODE, WORLD
from shoal.strategy.bucket import Bucket
from shoal.strategy.codec.feedback import Coder
from shoal.strategy.sync.local import MEASURED_STEPS, TIMED_EXCHANGES, LocalSync, least_every
from shoal.wire.transport import Memory


@dataclass
class _Transit:
    """A fragment's way to the other ranks: one bucket for each section, and the round that is not over.

    `arrived`: the mean differences, where they are kept elsewhere than in the buckets.
    """

    fragment: Fragment
    buckets: list[Bucket]
    pending: list[Future[Any]] | None = None
    arrived: list[Tensor] | None = None

    @property
    def is_under_way(self) -> bool:
        """Whether a round has begun and is not over."""
        return self.pending is not None or self.arrived is not None


class LocalExchange(OnLanes):
    """Runs `LocalSync`."""

    asynchronous = False
    replicas_equal = False

    def __init__(self, wiring: Wiring, sync: LocalSync, coder: Coder | None) -> None:
        """Go on from the wiring's ledger, or lay the model out in fragments, all of it the anchor. Collective."""
        self._wiring, self._sync, self._config, self._coder = wiring, sync, sync.config, coder
        super().__init__(wiring)
        self._group = NODE if sync.hierarchical else WORLD
        rank, world_size = wiring.topology.rank, wiring.topology.world_size
        agreement = Agreement(rank, world_size, lambda n, dtype: self._allocate(0, n, dtype))
        self._agreement = LaggedAgreement(agreement, self._lanes[0], sync, rank)
        self._ledger = wiring.ledger or Ledger.of(wiring.replica, sync.config)
        if not self._ledger.every:
            self._ledger.base = wiring.first_step
        self._transits = [
            _Transit(fragment, [self._bucket(section) for section in fragment.sections])
            for fragment in self._ledger.fragments
        ]
        self._fence: Future[Any] | None = None
        self._peer_lost: PeerLostError | None = None
        self._samples = (0, 0)
        self._step = wiring.first_step
        self._measured_s: list[float] = []
        self._last_t = time.perf_counter()
        if self._ledger.every:
            self._tell_rhythm()

    def denominator(self, batch: Batch) -> float:
        """This rank's own samples: it trains by itself."""
        return max(batch.replica_share, 1)

    def begin(self, batch: Batch, clock: int) -> None:
        """Note the samples, which become the weights of the next averages when the step counts."""
        self._require_peers()
        self._wiring.replica.clear_gradients()
        self._samples = (batch.replica_share, batch.size)

    def before_backward(self) -> None:
        """Nothing is exchanged during backward."""

    def before_last_backward(self, loss: Tensor, ballot: Ballot) -> None:
        """Take part in the agreement, if it is due."""
        own, everybody = self._samples
        self._agreement.propose(self._step, loss, loss * (own / everybody), ballot)

    def finish(self) -> Verdict:
        """Nothing to wait for."""
        return self._agreement.verdict()

    def clip(self, max_norm: float) -> float:
        """Clip this rank's own gradient."""
        return self._wiring.replica.clip(max_norm)

    def install(self) -> None:
        """The gradients are where autograd put them."""
        if self._samples[0]:
            require_gradients(self._wiring.replica)

    def release(self) -> None:
        """The step counts: merge what is due, and let leave what is due. A loss is raised by whatever comes next."""
        self._step += 1
        self._ledger.count(*self._samples)
        try:
            self._exchange_what_is_due()
        except PeerLostError as error:
            self._peer_lost = error

    @contextmanager
    def consensus(self) -> Iterator[None]:
        """The anchor is what all ranks agree on."""
        self._require_peers()
        fragments = self._ledger.fragments
        sections = [section for fragment in fragments for section in fragment.sections]
        anchors = [anchor for fragment in fragments for anchor in fragment.anchors]
        with parameters.holding(self._wiring.replica, sections, anchors):
            yield

    def turn(self) -> None:
        """Who goes leaves what it learned to all, and who comes begins from the anchor."""
        self.conclude()

    def conclude(self) -> bool:
        """Merge what is on its way, then average everything once more, without momentum."""
        self._require_peers()
        self._agreement.drain()
        everything = list(range(len(self._transits)))
        self._merge(everything)
        self._leave(everything, exact=True, plain=True)
        for transit in self._transits:
            self._take_in(transit)
        self._pass_fence(begin=True)
        return True

    def close(self, *, wait: bool = False) -> None:
        """End the communication threads and their transports. `wait`: a view ends, and what has arrived is merged."""
        if wait:
            for transit in self._transits:
                with contextlib.suppress(PeerLostError):
                    self._take_in(transit)
        super().close(wait=wait)

    def model_state(self) -> dict[str, Any]:
        """The model with the anchor's values."""
        with self.consensus():
            state: dict[str, Any] = self._wiring.replica.state_dict()
            return state

    def state_dict(self) -> dict[str, Any]:
        """This rank's own values, what is on its way, and the rhythm."""
        self._require_peers()
        for transit in self._transits:
            if transit.pending is not None:
                transit.arrived = [difference.clone() for difference in self._differences(transit)]
        return {
            "step": self._step,
            **copied(self._ledger.state_dict()),
            "arrived": copied([transit.arrived for transit in self._transits]),
            "coder": copied(self._coder.state_dict()) if self._coder else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`'s value; the model holds the anchor."""
        self._step = state["step"]
        self._ledger.load_state_dict(state)
        for transit, arrived in zip(self._transits, state["arrived"], strict=True):
            transit.arrived = arrived
        if self._coder is not None and state["coder"] is not None:
            self._coder.load_state_dict(state["coder"])

    def _bucket(self, section: Section) -> Bucket:
        memory = self._allocate(1, len(section.values), section.values.dtype)
        return Bucket.over(section.name, memory, len(section.values), section.pieces)

    def _allocate(self, lane: int, num_values: int, dtype: torch.dtype) -> Memory:
        return self._lanes[lane].transports[self._group].allocate(num_values, dtype)

    def _require_peers(self) -> None:
        """Nothing more is begun after a loss.

        Raises:
            PeerLostError: a rank was lost after the step before.
        """
        if self._peer_lost is not None:
            raise PeerLostError(str(self._peer_lost)) from self._peer_lost

    def _exchange_what_is_due(self) -> None:
        rhythm, step = self._ledger.rhythm, self._step - self._ledger.base
        if rhythm is None:
            self._measure()
            return
        if rhythm.overlap:
            self._merge(rhythm.merging(step))
        self._leave(rhythm.leaving(step))
        if not rhythm.overlap:
            self._merge(rhythm.merging(step))

    def _leave(self, fragments: list[int], *, exact: bool = False, plain: bool = False) -> None:
        """Let differences leave; the exchange runs in the background. For `plain` see `Leaving`."""
        exchange = self._sync.exchange_exact if exact else self._sync.exchange
        for transit in (self._transits[f] for f in fragments):
            self._pass_fence()
            fragment = transit.fragment
            weight = fragment.leave(self._step, plain=plain)
            transit.pending = []
            for bucket, anchor, sent in zip(transit.buckets, fragment.anchors, fragment.sent, strict=True):
                torch.sub(anchor, sent, out=bucket.source)
                bucket.source.mul_(weight)
                transit.pending.append(self._lanes[1].submit(exchange(bucket)))

    def _merge(self, fragments: list[int]) -> None:
        """Take in what has left, once it has arrived: a round of the view before may never have happened."""
        for transit in (self._transits[f] for f in fragments):
            if transit.is_under_way:
                self._take_in(transit)
                self._pass_fence(begin=True)

    def _take_in(self, transit: _Transit) -> None:
        """Move a fragment's anchor, and put this rank's own steps since then on it; nothing if none is on its way."""
        if transit.is_under_way:
            transit.fragment.merge(self._differences(transit), self._config, overlaps=self._ledger.overlaps)

    def _differences(self, transit: _Transit) -> list[Tensor]:
        """The mean differences of a fragment that has left; waits for them."""
        if transit.arrived is not None:
            arrived, transit.arrived, transit.pending = transit.arrived, None, None
            return arrived
        assert transit.pending is not None
        for future in transit.pending:
            self._lanes[1].wait(future)
        transit.pending = None
        return [bucket.target for bucket in transit.buckets]

    def _pass_fence(self, *, begin: bool = False) -> None:
        """Shared memory is written again only when all ranks of the node have read it."""
        if self._fence is not None:
            self._lanes[1].wait(self._fence)
            self._fence = None
        if begin and self._sync.hierarchical:
            self._fence = self._lanes[1].submit(self._sync.fence())

    def _measure(self) -> None:
        """Time the first steps and one exchange, and settle how often to exchange. Collective at the last of them."""
        now, step = time.perf_counter(), self._step - self._ledger.base
        if step in MEASURED_STEPS:
            self._measured_s.append(now - self._last_t)
        self._last_t = now
        if step < MEASURED_STEPS.stop - 1:
            return
        exchange_s = self._time_exchange()
        step_s = sorted(self._measured_s)[len(self._measured_s) // 2]
        rank, world_size = self._wiring.topology_of_all.rank, self._wiring.topology_of_all.world_size
        own = [0.0] * (2 * world_size)
        own[rank], own[world_size + rank] = step_s, exchange_s
        told = self._wiring.world.sum(own)
        self._ledger.every = least_every(max(told[world_size:]), max(told[:world_size]), len(self._transits))
        self._ledger.base = self._step
        self._tell_rhythm()

    def _time_exchange(self) -> float:
        """Exchange the largest fragment, and return the seconds that the whole model would take.

        Twice: the first one waits for the slowest rank and for fresh memory, the second one is timed.
        """
        sizes = [sum(bucket.num_values for bucket in transit.buckets) for transit in self._transits]
        largest = sizes.index(max(sizes))
        started = time.perf_counter()
        for _ in range(TIMED_EXCHANGES):
            started = time.perf_counter()
            self._leave([largest], plain=True)
            self._merge([largest])
        return (time.perf_counter() - started) * sum(sizes) / max(max(sizes), 1)

    def _tell_rhythm(self) -> None:
        rhythm = self._ledger.rhythm
        assert rhythm is not None
        if self._wiring.topology_of_all.rank == 0:
            told = {"every": rhythm.every, "fragments": rhythm.fragments, "overlap": rhythm.overlap}
            self._wiring.log.write("rhythm", **told)
