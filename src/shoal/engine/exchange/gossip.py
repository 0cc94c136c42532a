"""Gossip on one rank: parameters are mixed with the neighbours' while the gradient is computed from the old ones.

Where ranks come and go (`engine/views/course.py`), each view has a graph of its own over those who live, and every
survivor keeps its replica. In a planned change nothing is lost: all take the mean of all replicas first. Under a codec,
what neighbours were told belongs to the old graph: all forget it together, and begin to tell each other anew.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from shoal.data.loader import Batch
from shoal.engine.exchange import parameters
from shoal.engine.exchange.agreement import Agreement, Ballot, Verdict
from shoal.engine.exchange.base import OnLanes, Wiring, copied
from shoal.engine.exchange.clipping import require_gradients
from shoal.engine.exchange.lagged import LaggedAgreement
from shoal.ops import WORLD
from shoal.strategy.bucket import Bucket
from shoal.strategy.codec.feedback import Coder
from shoal.strategy.flat import bucket_bytes
from shoal.strategy.sync.gossip import GossipSync


class GossipExchange(OnLanes):
    """Runs `GossipSync` once a step (D-PSGD)."""

    asynchronous = False
    replicas_equal = False

    def __init__(self, wiring: Wiring, sync: GossipSync, coder: Coder | None) -> None:
        """Lay the model out; collective."""
        self._wiring, self._sync, self._coder = wiring, sync, coder
        super().__init__(wiring)
        rank, self._world_size = wiring.topology.rank, wiring.topology.world_size
        allocate = self._lanes[0].transports[WORLD].allocate
        self._agreement = LaggedAgreement(Agreement(rank, self._world_size, allocate), self._lanes[0], sync, rank)
        [self._sections] = parameters.lay_out(wiring.replica, 1, bucket_bytes(sync.config.bucket_mb))
        self._buckets = []
        for section in self._sections:
            memory = self._lanes[1].transports[WORLD].allocate(len(section.values), section.values.dtype)
            self._buckets.append(Bucket.over(section.name, memory, len(section.values), section.pieces))
        self._mixing: list[Future[Any]] = []
        self._step = wiring.first_step
        self._weight = 0.0

    def denominator(self, batch: Batch) -> float:
        """The mean share: the mean of all ranks' gradients is then the mean over the global batch."""
        return batch.size / self._world_size

    def begin(self, batch: Batch, clock: int) -> None:
        """Start to mix the parameters as they are now."""
        self._wiring.replica.clear_gradients()
        self._weight = batch.replica_share / batch.size
        for section, bucket in zip(self._sections, self._buckets, strict=True):
            bucket.source.copy_(section.values)
            self._mixing.append(self._lanes[1].submit(self._sync.mix(bucket, self._step)))

    def before_backward(self) -> None:
        """Nothing is exchanged during backward."""

    def before_last_backward(self, loss: Tensor, ballot: Ballot) -> None:
        """Take part in the agreement, if it is due. `loss` is told as the mean of this rank's own samples."""
        own = loss / (self._weight * self._world_size) if self._weight else loss
        self._agreement.propose(self._step, own, loss / self._world_size, ballot)

    def finish(self) -> Verdict:
        """Nothing to wait for."""
        return self._agreement.verdict()

    def clip(self, max_norm: float) -> float:
        """Clip this rank's own gradient."""
        return self._wiring.replica.clip(max_norm)

    def install(self) -> None:
        """Take in the mixture; the gradient of the parameters before is applied to it."""
        if self._weight:
            require_gradients(self._wiring.replica)
        for future in self._mixing:
            self._lanes[1].wait(future)
        self._mixing.clear()
        for section, bucket in zip(self._sections, self._buckets, strict=True):
            section.values.copy_(bucket.target)

    def release(self) -> None:
        """One more step."""
        self._step += 1

    @contextmanager
    def consensus(self) -> Iterator[None]:
        """The mean of all replicas. Tells how far they are apart."""
        means = self._means()
        square = sum(
            float((section.values - mean).double().square().sum())
            for section, mean in zip(self._sections, means, strict=True)
        )
        distance = math.sqrt(self._wiring.world.sum([square])[0] / self._world_size)
        if self._wiring.topology_of_all.rank == 0:
            self._wiring.log.write("consensus", step=self._step, distance=distance)
        with parameters.holding(self._wiring.replica, self._sections, means):
            yield

    def turn(self) -> None:
        """Who goes leaves what it learned to all: every replica becomes the mean."""
        self.conclude()

    def conclude(self) -> bool:
        """Every replica becomes the mean of all."""
        self._agreement.drain()
        for section, mean in zip(self._sections, self._means(), strict=True):
            section.values.copy_(mean)
        return True

    def model_state(self) -> dict[str, Any]:
        """The model with the mean of all replicas. Collective."""
        with parameters.holding(self._wiring.replica, self._sections, self._means()):
            state: dict[str, Any] = self._wiring.replica.state_dict()
            return state

    def state_dict(self) -> dict[str, Any]:
        """This rank's own values, and what neighbours were told."""
        return {
            "step": self._step,
            "values": copied([section.values for section in self._sections]),
            "told": copied(self._sync.state_dict()),
            "coder": copied(self._coder.state_dict()) if self._coder else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`'s value."""
        self._step = state["step"]
        for section, values in zip(self._sections, state["values"], strict=True):
            section.values.copy_(values)
        self._sync.load_state_dict(state["told"])
        if self._coder is not None and state["coder"] is not None:
            self._coder.load_state_dict(state["coder"])

    def _means(self) -> list[Tensor]:
        """The mean of all replicas, section by section, in fresh memory. Collective; nothing is on its way."""
        means = []
        for section, bucket in zip(self._sections, self._buckets, strict=True):
            torch.div(section.values, self._world_size, out=bucket.source)
            self._lanes[1].wait(self._lanes[1].submit(self._sync.exchange_exact(bucket)))
            means.append(bucket.target.clone())
        return means
