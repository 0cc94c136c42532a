"""What the loop sees of a sync: one replica among others, step by step.

Called in this order each step: `begin`, `before_backward` for each micro-batch but the last, `before_last_backward`
(also where there is no micro-batch), `finish`, `clip`, `install`, then the optimizer, then `release`. What each does
depends on what a sync exchanges: gradients (gradients.py), parameters every so often (local.py), parameters with
neighbours (gossip.py), gradients against parameters with servers (servers.py).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from shoal.data.loader import Batch
from shoal.engine.exchange.agreement import Ballot, Verdict
from shoal.engine.exchange.communicator import Lane
from shoal.engine.exchange.ledger import Ledger
from shoal.engine.layout.replica import Replica
from shoal.events import EventLog
from shoal.strategy.topology import Topology
from shoal.wire.groups import World
from shoal.wire.traffic import Traffic, total
from shoal.wire.transport import Transport


@dataclass(frozen=True, kw_only=True)
class Among:
    """A view as an exchange sees it.

    Attributes:
        seats: the members', in order of rank; a seat outlives a view.
        servers: where the parameter servers listen.
        lost_servers: the places of those that are gone.
    """

    epoch: int
    seats: tuple[int, ...]
    servers: tuple[str, ...] = ()
    lost_servers: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Wiring:
    """What an exchange is built from.

    Attributes:
        replica: this rank's part of its replica.
        lanes: for each lane its transports by group; they belong to the exchange from now on.
        topology: the ranks that hold the same part of the other replicas, and this one.
        topology_of_all: all ranks.
        world: all ranks' connections and store.
        first_step: steps that were committed before.
        among: the view of those who come and go; None where all stay from beginning to end.
        ledger: of local steps, what this rank holds from the view before; None: nothing.
    """

    replica: Replica
    optimizer: Optimizer
    lanes: list[dict[str, Transport]]
    topology: Topology
    topology_of_all: Topology
    world: World
    device: torch.device
    log: EventLog
    first_step: int = 0
    among: Among | None = None
    ledger: Ledger | None = None


class ReplicaExchange(Protocol):
    """Keeps one rank's replica in agreement with the others.

    Attributes:
        asynchronous: ranks go at their own pace, and meet only now and then.
        replicas_equal: between steps every rank holds the same parameters and optimizer state.
        stalled_s: how long this rank has waited for others in the backward of the step at hand.
    """

    asynchronous: bool
    replicas_equal: bool
    stalled_s: float

    @property
    def traffic(self) -> Traffic:
        """What this rank's lanes have sent to other ranks so far."""

    @property
    def bytes_sent(self) -> int:
        """Payload bytes that this rank has put on the network so far."""

    def denominator(self, batch: Batch) -> float:
        """What a sum of this rank's sample losses is divided by before backward."""

    def begin(self, batch: Batch, clock: int) -> None:
        """A new step, on a part of the global batch number `clock`."""

    def before_backward(self) -> None:
        """Call before each micro-batch's backward."""

    def before_last_backward(self, loss: Tensor, ballot: Ballot) -> None:
        """Call before the last micro-batch's backward.

        Args:
            loss: the sum of this rank's sample losses over `denominator`, a scalar.
            ballot: what this rank puts to the others.
        """

    def finish(self) -> Verdict:
        """Wait for what this step needs of others; return what is agreed."""

    def clip(self, max_norm: float) -> float:
        """Scale the gradients down to `max_norm`; return their norm before that."""

    def install(self) -> None:
        """Make the parameters' `grad` ready for the optimizer.

        Raises:
            JobError: there is no gradient for anything.
        """

    def release(self) -> None:
        """The optimizer has taken its step."""

    def consensus(self) -> AbstractContextManager[None]:
        """While it lasts the model holds what all ranks agree on. Collective."""

    def settle(self) -> None:
        """Before a meeting: wait until everything that this rank has told others is known to them."""

    def turn(self) -> None:
        """All go to another view after this step: leave nothing that only one replica holds. Collective."""

    def conclude(self) -> bool:
        """Training ends: make all replicas equal; return whether that changed the model. Collective."""

    def model_state(self) -> dict[str, Any]:
        """The model's state dict with the parameters that all ranks agree on, of tensors that live on."""

    def state_dict(self) -> dict[str, Any]:
        """What only this rank holds and a resumed run needs, beside the parts; may be empty. Tensors are copies."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`'s value."""

    def close(self, *, wait: bool = False) -> None:
        """End threads and transports. `wait`: until the threads have ended; else a thread may wait for a lost peer."""


class Keeper(Protocol):
    """An exchange of ranks at their own pace that knows which parts of a round its values have learned from."""

    def open_round(self, step: int, num_parts: int, used: frozenset[int]) -> frozenset[int]:
        """A round begins, or goes on in another view. Collective.

        Args:
            step: committed when it began; names it.
            used: the numbers that this rank's values have learned from already.

        Returns:
            The numbers that any rank's values, or the servers', have learned from.
        """

    def lease(self, number: int) -> None:
        """The next step is on part `number`."""

    @property
    def used(self) -> frozenset[int]:
        """The numbers of this round that live on with this rank."""

    def meet(self) -> None:
        """A round ends: from now on nothing of it is held by one rank alone. Collective."""


class OnLanes:
    """What exchanges that own lanes have in common."""

    stalled_s = 0.0

    def __init__(self, wiring: Wiring) -> None:
        self._lanes = [Lane(transports, wiring.device) for transports in wiring.lanes]

    @property
    def traffic(self) -> Traffic:
        """What this rank's lanes have sent to other ranks so far."""
        return total(lane.traffic for lane in self._lanes)

    @property
    def bytes_sent(self) -> int:
        """Payload bytes that this rank has put on the network so far."""
        return sum(lane.bytes_sent for lane in self._lanes)

    def settle(self) -> None:
        """Nothing is under way between meetings."""

    def turn(self) -> None:
        """All replicas are equal."""

    def close(self, *, wait: bool = False) -> None:
        """End the communication threads and their transports."""
        for lane in self._lanes:
            lane.close(wait=wait)


def copied(state: Any) -> Any:
    """A copy of nested dictionaries, lists and tuples, tensors included."""
    match state:
        case Tensor():
            return state.detach().clone()
        case dict():
            return {key: copied(item) for key, item in state.items()}
        case list() | tuple():
            return type(state)(copied(item) for item in state)
        case _:
            return state
