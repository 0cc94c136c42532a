"""Connects to the members of one view, on a thread of its own: the view before may train on meanwhile."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from shoal.cluster.views import View
from shoal.engine.build import Connected, connect_lanes
from shoal.engine.layout.place import take_place_in_view
from shoal.errors import PeerLostError
from shoal.plan import Plan
from shoal.strategy.topology import Topology
from shoal.wire.groups import World, failures_as_lost_peers
from shoal.wire.transport import MemoryPool

_CONNECT_TIMEOUT_S = 30.0


class Connecting:
    """One rank's way into a view."""

    def __init__(
        self,
        view: View,
        rank: int,
        plan: Plan,
        device: torch.device,
        *,
        on_done: Callable[[], None],
        exempt_port: int,
        pool: MemoryPool,
    ) -> None:
        """Begin.

        Args:
            plan: resolved for the view's number of ranks.
            on_done: called from the thread at its end.
            pool: memory that outlives views.
            exempt_port: connections to it (the coordinator's) survive a cut.
        """
        self.view = view
        self._rank = rank
        self._plan = plan
        self._device = device
        self._pool = pool
        self._on_done = on_done
        self._exempt = [exempt_port, *(_port_of(member.store) for member in view.members)]
        self._world: World | None = None
        self._is_cut = False
        self._is_closed = False
        self._lock = threading.Lock()
        self.connected: Connected | None = None
        self.failed: BaseException | None = None
        self._thread = threading.Thread(target=self._connect, daemon=True, name=f"shoal-view-{view.epoch}")
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether it has succeeded or failed."""
        return self.connected is not None or self.failed is not None

    @property
    def is_ready(self) -> bool:
        """Whether this rank could train in the view at once."""
        return self.connected is not None and not self._is_cut

    def result(self) -> Connected:
        """What was connected, once it is done.

        Raises:
            PeerLostError: a member could not be reached, or the view was cut meanwhile.
        """
        if self.failed is not None:
            raise PeerLostError(f"view {self.view.epoch} could not be formed: {self.failed}") from self.failed
        assert self.connected is not None
        if self._is_cut:
            raise PeerLostError(f"view {self.view.epoch} ended before it began")
        return self.connected

    def cut(self) -> None:
        """End every operation in this view, now and later; from any thread."""
        with self._lock:
            self._is_cut = True
            world = self._world
        if world is not None:
            world.cut()

    def close(self) -> None:
        """Cut, and give all connections and shared memory back. No exchange of this view runs any more."""
        self.cut()
        with self._lock:
            self._is_closed = True
            world = self._world if self.is_done else None  # else the thread does it
        if world is not None:
            world.close()

    def _connect(self) -> None:
        try:
            self.connected = self._connected()
        except BaseException as error:
            self.failed = error
        with self._lock:
            world = self._world if self._is_closed else None
        if world is not None:
            world.close()
        self._on_done()

    def _connected(self) -> Connected:
        view = self.view
        first, port = view.members[0].store.rsplit(":", 1)
        with failures_as_lost_peers(f"reaching seat {view.members[0].seat} on {view.members[0].node}"):
            client = dist.TCPStore(
                first, int(port), None, False, timeout=timedelta(seconds=_CONNECT_TIMEOUT_S), wait_for_workers=False
            )
        store = dist.PrefixStore(f"view/{view.epoch}", client)
        size = len(view.members)
        world = World(
            store, self._rank, size, self._device, connect_timeout_s=_CONNECT_TIMEOUT_S, exempt_ports=self._exempt
        )
        with self._lock:
            self._world = world
            if self._is_cut:
                world.cut()
        world.connect()
        topology = Topology(self._rank, tuple(member.node for member in view.members))
        connected = connect_lanes(self._plan, topology, world, self._device, self._pool)
        place = take_place_in_view(self._plan.layout, connected.grid, world, self._device)
        if place is not None or (view.planned and self._plan.sync.kind == "allreduce"):
            # What travels while all train: copies of shards; a newcomer's state, which only all-reduce lets it follow.
            connected = dataclasses.replace(connected, aside=world.group("aside", range(size)), place=place)
        return connected


def _port_of(address: str) -> int:
    return int(address.rsplit(":", 1)[1])
