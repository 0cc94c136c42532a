"""Asynchronous gossip on one rank: AD-PSGD (Lian et al. 2018). Nobody waits for anybody.

The values that count lie apart from those the model computes with, under a lock. A thread of this rank averages them
with one random neighbour's at a time; another answers when a neighbour asks. A pair's sum stays what it was: the one
asked moves half of the difference at once, the one that asked takes the other half when the answer is there. A gradient
is applied to the values as they are by then, not to those that it was computed from.

Where ranks come and go, each knows which parts of the round at hand its values have learned from, its own and those
that came with averages; so of a rank that is lost, what a survivor has heard of counts, and the rest is leased again.
An average whose other side has gone is dropped: one of the two may have moved already, so the mean of the replicas may
move by half of what they were apart. At the end of a round all take the mean (as in Gossip-PGA, Chen et al. 2021), so
nothing that a round has learned can be lost after it.
"""

from __future__ import annotations

import os
import random
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import zmq
from numpy.typing import NDArray
from torch import Tensor

from shoal.data.loader import Batch
from shoal.engine.exchange.agreement import Ballot, Verdict
from shoal.engine.exchange.base import Wiring
from shoal.engine.exchange.clipping import require_gradients
from shoal.engine.exchange.gossip import GossipExchange
from shoal.errors import PeerLostError
from shoal.strategy.codec.feedback import Coder
from shoal.strategy.sync.gossip import GossipSync, graph_of
from shoal.wire.addresses import own_address
from shoal.wire.bulk import Link, Listener
from shoal.wire.frame import Header, Message, Operation
from shoal.wire.groups import failures_as_lost_peers

_PATIENCE = timedelta(seconds=120)
_SILENCE_S = 60.0
_TICK_MS = 50
_LEARNED = "learned"  # beside the sections in a message


class PairsExchange(GossipExchange):
    """Runs `GossipSync` in its asynchronous mode."""

    asynchronous = True

    def __init__(self, wiring: Wiring, sync: GossipSync, coder: Coder | None) -> None:
        """Lay the model out and connect to the neighbours; collective."""
        super().__init__(wiring, sync, coder)
        rank, store = wiring.topology.rank, wiring.world.store
        self._values = [section.values.clone() for section in self._sections]
        self._lock = threading.Lock()
        self._dice = random.Random(rank)
        self._own_loss = torch.zeros(())
        self._learned: dict[int, NDArray[np.bool_]] = {}  # by round, its step; empty where nobody comes or goes
        self._round = 0
        self._number = 0
        self._listener = Listener(f"tcp://{own_address(os.environ)}:*")
        store.set(f"pairs/{rank}", self._listener.address)
        self._context: zmq.Context[Any] = zmq.Context()
        self._links: list[Link] = []
        graph = graph_of(sync.config, self._world_size)
        peers = [r for r in range(self._world_size) if r != rank]
        for peer in peers if sync.config.topology == "matching" else graph.neighbours(rank):
            store.wait([f"pairs/{peer}"], _PATIENCE)
            self._links.append(Link(self._context, peer, store.get(f"pairs/{peer}").decode()))
        self._averaging: Future[None] | None = None
        self._sent_bytes = 0
        self._closing = threading.Event()
        self._asker = ThreadPoolExecutor(1, thread_name_prefix="shoal-pairs")
        self._answerer = threading.Thread(target=self._answer, daemon=True, name="shoal-pairs-answer")
        self._answerer.start()

    @property
    def bytes_sent(self) -> int:
        """Payload bytes that this rank has put on the network so far."""
        return super().bytes_sent + self._sent_bytes

    def begin(self, batch: Batch, clock: int) -> None:
        """Compute with the values as they are now."""
        self._wiring.replica.clear_gradients()
        self._weight = batch.replica_share / batch.size
        self._show()

    def before_last_backward(self, loss: Tensor, ballot: Ballot) -> None:
        """Nothing is agreed on between meetings."""
        self._own_loss = loss / (self._weight * self._world_size) if self._weight else loss

    def finish(self) -> Verdict:
        """Nothing to wait for."""
        finite = bool(torch.isfinite(self._own_loss))
        return Verdict(float(self._own_loss), [] if finite else [self._wiring.topology.rank], stop=False)

    def install(self) -> None:
        """Take in what was averaged meanwhile; until `release` nobody else may change the values."""
        if self._weight:
            require_gradients(self._wiring.replica)
        self._lock.acquire()
        self._show()

    def release(self) -> None:
        """The values after the update count; ask a neighbour to average, unless one is still at it."""
        for section, values in zip(self._sections, self._values, strict=True):
            values.copy_(section.values)
        if self._round in self._learned:
            self._learned[self._round][self._number] = True
        self._lock.release()
        self._step += 1
        if self._links and (self._averaging is None or self._averaging.done()):
            self._finish_averaging()
            self._averaging = self._asker.submit(self._average_with, self._dice.choice(self._links))

    def settle(self) -> None:
        """Wait until this rank's own averaging is over. Others may still ask."""
        self._finish_averaging()

    def open_round(self, step: int, num_parts: int, used: frozenset[int]) -> frozenset[int]:
        """A round begins, or goes on in another view. Collective."""
        with self._lock:
            learned = self._learned.pop(step, np.zeros(num_parts, dtype=np.bool_))[:num_parts]  # others may be ahead
            learned[list(used)] = True
            self._learned, self._round = {step: learned}, step
        if not self._wiring.world.sum([float(len(used))])[0]:
            return frozenset()
        known = torch.from_numpy(learned.astype(np.int32))
        with failures_as_lost_peers("telling what was learned"):
            self._wiring.world.everybody.all_reduce(known)
        return frozenset(known.nonzero().flatten().tolist())

    def lease(self, number: int) -> None:
        """The next step is on part `number`."""
        self._number = number

    @property
    def used(self) -> frozenset[int]:
        """The parts of this round that this rank's values have learned from."""
        return frozenset(np.flatnonzero(self._learned[self._round]).tolist())

    def meet(self) -> None:
        """Every replica becomes the mean of all. Collective: everybody has settled."""
        with self._lock:
            self._take_mean()

    def turn(self) -> None:
        """All have met."""

    def _take_mean(self) -> None:
        self._show()
        means = GossipExchange._means(self)
        for section, values, mean in zip(self._sections, self._values, means, strict=True):
            section.values.copy_(mean)
            values.copy_(mean)

    def conclude(self) -> bool:
        """Every replica becomes the mean of all."""
        super().conclude()
        for section, values in zip(self._sections, self._values, strict=True):
            values.copy_(section.values)
        return True

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`'s value."""
        super().load_state_dict(state)
        for section, values in zip(self._sections, self._values, strict=True):
            values.copy_(section.values)

    def state_dict(self) -> dict[str, Any]:
        """This rank's own values."""
        self._show()
        return super().state_dict()

    def close(self, *, wait: bool = False) -> None:
        """End the threads and connections."""
        self._closing.set()
        self._answerer.join(timeout=5)
        self._asker.shutdown(wait=True)
        self._show()
        for link in self._links:
            link.close()
        self._context.destroy(linger=0)
        super().close(wait=wait)

    def _means(self) -> list[Tensor]:
        self._show()
        return super()._means()

    def _show(self) -> None:
        """Let the model hold the values that count."""
        for section, values in zip(self._sections, self._values, strict=True):
            section.values.copy_(values)

    def _finish_averaging(self) -> None:
        if self._averaging is not None:
            self._averaging.result()
            self._averaging = None

    def _average_with(self, link: Link) -> None:
        with self._lock:
            sent, learned, step = [values.clone() for values in self._values], self._told(), self._round
        tensors = [(s.name, v) for s, v in zip(self._sections, sent, strict=True)]
        header = Header(Operation.PUSH, rank=self._wiring.topology.rank, clock=step)
        self._sent_bytes += link.send(header, tensors + learned)
        answer = self._receive(link)
        if answer is None:
            return
        with self._lock:
            for index, values in enumerate(self._values):
                values.add_(answer.tensor(index).sub_(sent[index]), alpha=0.5)
            self._note(answer)

    def _answer(self) -> None:
        while not self._closing.is_set():
            if self._listener.socket.poll(_TICK_MS):
                request = self._listener.receive()
                if request is not None:
                    self._answer_one(*request)
        self._listener.close()

    def _answer_one(self, identity: bytes, message: Message) -> None:
        expected = [(s.name, s.values.shape, s.values.dtype) for s in self._sections]
        entries = [(e.name, torch.Size(e.shape), e.dtype) for e in message.entries if e.name != _LEARNED]
        if entries != expected:
            self._listener.drop("an average of another model's values")
            return
        old = []
        with self._lock:
            learned, step = self._told(), self._round
            for index, values in enumerate(self._values):
                old.append((self._sections[index].name, values.clone()))
                values.lerp_(message.tensor(index), 0.5)
            self._note(message)
        self._listener.send(identity, Header(Operation.DONE, request=message.header.request, clock=step), old + learned)
        self._sent_bytes += sum(values.numel() * values.element_size() for _, values in old)

    def _told(self) -> list[tuple[str, Tensor]]:
        """What goes with this rank's values: a bit for each part of the round that they have learned from."""
        learned = self._learned.get(self._round)
        return [] if learned is None else [(_LEARNED, torch.from_numpy(np.packbits(learned)))]

    def _note(self, message: Message) -> None:
        """These values' parts are now in this rank's, too. Whoever is a round ahead tells of one not begun here."""
        if message.entries[-1].name != _LEARNED:
            return
        bits = np.unpackbits(message.tensor(len(message.entries) - 1).numpy()).astype(np.bool_)
        known = self._learned.get(message.header.clock)
        if known is None:
            self._learned[message.header.clock] = bits
        else:
            known |= bits[: len(known)]

    def _receive(self, link: Link) -> Message | None:
        """The answer; None if the view ended before."""
        deadline = time.monotonic() + _SILENCE_S
        while time.monotonic() < deadline:
            if self._wiring.world.is_cut:
                return None
            if link.socket.poll(_TICK_MS):
                answer = link.receive()
                if answer is not None:
                    return answer
        raise PeerLostError(f"rank {link.index} at {link.address} did not answer an average within {_SILENCE_S:.0f} s")
