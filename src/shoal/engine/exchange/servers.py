"""A worker of parameter servers: pushes gradients and pulls values, in the background where the mode allows it.

Where workers come and go, the servers stay and hold the training's state; each view tells them who its workers are
(by seat, which outlives a view), and whatever still comes from an earlier view is refused. What becomes of a step that
a loss has cut in two is told in `engine/views/standing_in.py`. In mode async an update names the part that it learned
from, so the servers know which parts of a round are left to be leased again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from shoal.data.loader import Batch
from shoal.engine.exchange.agreement import Agreement, Ballot, Verdict
from shoal.engine.exchange.base import Among, Wiring, copied
from shoal.engine.exchange.clipping import require_gradients
from shoal.engine.exchange.communicator import Lane
from shoal.engine.exchange.lagged import LaggedAgreement
from shoal.engine.exchange.server_access import server_client
from shoal.errors import WireError
from shoal.job.sparse_table import SparseTable, sparse_tables
from shoal.ops import WORLD
from shoal.servers import Pending, RemoteTable, ServerClient
from shoal.strategy.codec.feedback import Coder
from shoal.strategy.sync.parameter_server import ParameterServerSync
from shoal.wire.groups import failures_as_lost_peers
from shoal.wire.traffic import Traffic

_PATIENCE = timedelta(seconds=120)
_PART_BITS = 24
"""A part is numbered within its round; above these bits stands the step at which the round began."""


class ServersExchange:
    """Runs `ParameterServerSync`."""

    replicas_equal = True
    stalled_s = 0.0

    def __init__(self, wiring: Wiring, sync: ParameterServerSync, coder: Coder | None) -> None:
        """Connect to the servers and put the model's values on them. Collective."""
        self._wiring, self._config, self._coder = wiring, sync.config, coder
        self.asynchronous = sync.config.mode == "async"
        self._overlaps = sync.config.mode == "async" or (sync.config.mode == "ssp" and sync.config.staleness > 0)
        [lane] = [Lane(transports, wiring.device) for transports in wiring.lanes]
        self._lane = lane
        self._rank, self._world_size = wiring.topology.rank, wiring.topology.world_size
        allocate = lane.transports[WORLD].allocate
        self._agreement = LaggedAgreement(Agreement(self._rank, self._world_size, allocate), lane, sync, self._rank)
        self._parameters = dict(wiring.replica.named_locals)
        self._among, self._is_leaving = wiring.among, False
        self._client = self._connect()
        self._tables = dict(sparse_tables(wiring.replica.model))
        self._remote = {name: self._attach(name, table) for name, table in self._tables.items()}
        self._pushes: list[Pending[None]] = []
        self._pull: Pending[dict[str, Tensor]] | None = None
        self._fresh = self._enter()
        self._clock = wiring.first_step - 1 if self._among else 0
        self._step = wiring.first_step
        self._part = self._first_part = 0
        self._weight = 0.0
        self._own_loss = torch.zeros(())

    @property
    def traffic(self) -> Traffic:
        """What this rank has sent to other ranks so far; servers are none."""
        return self._lane.traffic

    @property
    def bytes_sent(self) -> int:
        """Payload bytes that this rank has put on the network so far."""
        return self._lane.bytes_sent + self._client.bytes_sent

    def denominator(self, batch: Batch) -> float:
        """In bsp all samples, since the servers sum; otherwise the mean share, since each update is one of its own."""
        return batch.size / (1 if self._config.mode == "bsp" else self._world_size)

    def begin(self, batch: Batch, clock: int) -> None:
        """Take the values that were pulled; where the mode allows it, let the next ones come while this computes."""
        self._wiring.replica.clear_gradients()
        self._weight, self._clock = batch.replica_share / batch.size, clock
        for remote in self._remote.values() if self._among else ():
            remote.clock = self._tag
        if not self._fresh:
            self._take(self._pull or self._ask(clock))
            if not self.asynchronous:
                self._wiring.log.write("read", clock=clock, applied=self._client.read_clock)
        self._fresh = False
        self._pull = self._ask(clock + 1) if self._overlaps else None  # else it is asked for with the push

    def before_backward(self) -> None:
        """Nothing is exchanged during backward."""

    def before_last_backward(self, loss: Tensor, ballot: Ballot) -> None:
        """Take part in the agreement, if ranks go in step."""
        total = loss if self._config.mode == "bsp" else loss / self._world_size
        own = total / self._weight if self._weight else total
        self._own_loss = own
        if not self.asynchronous:
            self._agreement.propose(self._step, own, total, ballot)

    def finish(self) -> Verdict:
        """Nothing to wait for."""
        if not self.asynchronous:
            return self._agreement.verdict()
        loss = float(self._own_loss)
        return Verdict(loss, [] if torch.isfinite(self._own_loss) else [self._rank], stop=False)

    def clip(self, max_norm: float) -> float:
        """Clip this rank's own gradient."""
        return self._wiring.replica.clip(max_norm)

    def install(self) -> None:
        """Push the gradients; the servers' optimizers take the step, and this rank's own finds none."""
        if self._weight:
            require_gradients(self._wiring.replica)
        self._settle_pushes(keep=1)
        gradients = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.detach().cpu().contiguous()
            for name, p in self._parameters.items()
        }
        self._wiring.replica.clear_gradients()
        if self._overlaps:
            push = self._client.push(gradients, self._tag, self._coder)
        else:
            push, self._pull = self._client.push_pull(gradients, self._clock, self._coder)
        self._pushes.append(push)
        for table in self._tables.values():
            table.step()

    def release(self) -> None:
        """One more step."""
        self._step += 1

    @contextmanager
    def consensus(self) -> Iterator[None]:
        """The servers' values, when every update is in them. Collective."""
        self._refresh()
        yield

    def settle(self) -> None:
        """Wait until every push is acknowledged."""
        self._settle_pushes(keep=0)
        for remote in self._remote.values():
            remote.wait()

    def open_round(self, step: int, num_parts: int, used: frozenset[int]) -> frozenset[int]:
        """A round begins, or goes on in another view: the servers know what they have learned from. Collective."""
        self._first_part = step << _PART_BITS
        known = torch.zeros(num_parts, dtype=torch.int32)
        if self._rank == 0:
            parts = [part - self._first_part for part in self._client.parts_used(self._first_part)]
            known[[number for number in parts if number < num_parts]] = 1
        with failures_as_lost_peers("telling what was learned"):
            self._wiring.world.everybody.all_reduce(known)
        return frozenset(known.nonzero().flatten().tolist())

    def lease(self, number: int) -> None:
        """The next step is on part `number`."""
        self._part = self._first_part + number

    @property
    def used(self) -> frozenset[int]:
        """The servers know."""
        return frozenset()

    def meet(self) -> None:
        """The servers hold everything."""

    def turn(self) -> None:
        """The servers hold everything, as soon as it is acknowledged."""
        self.settle()

    def conclude(self) -> bool:
        """Take the final values. Collective."""
        self._agreement.drain()
        self._refresh()
        return True

    def model_state(self) -> dict[str, Any]:
        """The model with the servers' values. Collective."""
        self._refresh()
        state: dict[str, Any] = self._wiring.replica.state_dict()
        return state

    def state_dict(self) -> dict[str, Any]:
        """On rank 0 all that the servers hold. Collective: nobody pushes meanwhile."""
        self._refresh()
        state: dict[str, Any] = {
            "step": self._step,
            "clock": self._clock + 1,
            "coder": copied(self._coder.state_dict()) if self._coder else None,
        }
        if self._rank == 0:
            state["servers"] = {key: list(held) for key, held in self._client.dump().items()}
        self._wiring.world.sum([0.0])
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`'s value. Collective."""
        self._step = state["step"]
        if self._coder is not None and state["coder"] is not None:
            self._coder.load_state_dict(state["coder"])
        if self._rank == 0:
            held = {key: (document, tensors) for key, (document, tensors) in state["servers"].items()}
            self._client.restore(held, clock=state["clock"])
        self._wiring.world.sum([0.0])
        self._fresh = False
        self._clock = state["clock"] - 1
        for remote in self._remote.values():
            remote.clock = state["clock"]

    def close(self, *, wait: bool = False) -> None:
        """End the servers and the connections to them."""
        self._is_leaving = True
        if self._among is not None:  # the servers serve the next view
            with contextlib.suppress(WireError):
                self.settle()
        elif self._rank == 0:
            self._client.stop_servers()
        self._client.close()
        self._lane.close(wait=wait)

    @property
    def _tag(self) -> int:
        """What an update is known by: its step, or where workers come and go at their own pace, its part."""
        return self._part if self.asynchronous and self._among else self._clock

    def _connect(self) -> ServerClient:
        world, among = self._wiring.world, self._among
        if among is None:
            keys = [f"server/{index}" for index in range(self._config.servers)]
            world.store.wait(keys, _PATIENCE)
            among = Among(
                epoch=0,
                seats=tuple(range(self._world_size)),
                servers=tuple(world.store.get(key).decode() for key in keys),
            )
        return server_client(
            self._wiring.replica,
            self._config,
            among,
            worker=among.seats[self._rank],
            log=self._wiring.log.write,
            is_over=lambda: world.is_cut and not self._is_leaving,
        )

    def _enter(self) -> bool:
        """The servers hold the model and know who trains; return whether they have it from here. Collective."""
        is_loaded = False
        if self._rank == 0:
            is_loaded = self._among is not None and self._client.is_loaded()
            if not is_loaded:
                for name, table in self._tables.items():
                    self._client.create_table(name, table.spec)
                self._client.load({name: p.detach() for name, p in self._parameters.items()})
            if self._among is not None:
                self._client.change_members(self._among.seats, self._wiring.first_step)
        return not self._wiring.world.sum([float(is_loaded)])[0]

    def _attach(self, name: str, table: SparseTable) -> RemoteTable:
        self._client.know_table(name, table.spec)
        remote = RemoteTable(self._client, name)
        table.attach(remote)
        return remote

    def _ask(self, clock: int) -> Pending[dict[str, Tensor]]:
        return self._client.pull(list(self._parameters), clock)

    def _take(self, pull: Pending[dict[str, Tensor]]) -> None:
        values = pull.result()
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(values[name])

    def _settle_pushes(self, *, keep: int) -> None:
        while len(self._pushes) > keep:
            self._pushes.pop(0).result()

    def _refresh(self) -> None:
        """The same values on every rank: those after everybody's last push. Collective."""
        if self._pull is not None:
            self._pull.result()
            self._pull = None
        self.settle()
        self._wiring.world.sum([0.0])
        if self._step or not self._fresh:
            self._take(self._ask(self._clock + 1 if self._config.mode == "bsp" else 0))
        self._wiring.world.sum([0.0])
        self._fresh = True
