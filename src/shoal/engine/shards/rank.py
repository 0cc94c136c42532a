"""A rank of replicas that several ranks hold together (`layout.shard`), among others that come and go.

As `views/elastic.py`, with another rule for the state, since no rank has all of it. In each view the model is built
anew, and divided over those who are there (`sharded_over`). Its values are those of the newest complete state: the live
shards, as long as every shard has a living holder; else the newest copies in memory; else the newest checkpoint on
disk.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shoal.cluster.views import View
from shoal.engine import build, random_state
from shoal.engine.assemble import assemble, divide_as_planned
from shoal.engine.build import Connected, Parts
from shoal.engine.checkpoint.session import CheckpointSession
from shoal.engine.garbage import spare_what_lasts
from shoal.engine.loop import Loop
from shoal.engine.progress import Progress
from shoal.engine.restoring import restore
from shoal.engine.shards.choice import Choice, Label, choose, furthest, heirs, keepers, missing
from shoal.engine.shards.copies import Copies, Ring, send
from shoal.engine.shards.gate import Gate
from shoal.engine.shards.held import Holdings, Live
from shoal.engine.shards.regather import compare, describe, move
from shoal.engine.shards.shard import Shard, Source
from shoal.engine.start import Start
from shoal.engine.telling import Context, explain_layout
from shoal.engine.views.attending import AttendingRank
from shoal.engine.views.connecting import Connecting
from shoal.engine.views.following import Following
from shoal.errors import CheckpointError
from shoal.wire.blocks import return_large_blocks
from shoal.wire.groups import failures_as_lost_peers, lost_peers_named

_LIVE, _MEMORY, _DISK, _START = "live", "memory", "disk", "start"


@dataclass(frozen=True)
class _Entry:
    """How this rank came into a view: its live shard there, the parts that train it, and where the state is from."""

    live: Live
    parts: Parts
    origin: str
    took_state: bool


class ShardedRank(AttendingRank):
    """One that holds a shard."""

    def __init__(self, start: Start, node: str, env: Mapping[str, str]) -> None:
        """Say hello. No model is built before the first view says how it is divided."""
        super().__init__(start, node, env)
        return_large_blocks()
        self._job = dataclasses.replace(self._job, data=self._once(self._job.data))
        self._held = Holdings()
        self._dice: dict[str, Any] | None = None
        self._step = 0
        spare_what_lasts()
        self.views = Following(start, self._plan, self._target, self._device, node, env, self._way_out)

    def _stop_waiting(self) -> None:
        self._warn_of_stopping(self._step)
        self._log.write("left", step=self._step)

    def _once(self, data: Callable[[], Any]) -> Callable[[], Any]:
        """Make the data in the first view only, and leave random numbers as if they were made in each."""
        made: list[tuple[Any, dict[str, Any]]] = []

        def give() -> Any:
            if not made:
                made.append((data(), random_state.capture(self._device)))
            value, state = made[0]
            random_state.restore(state, self._device)
            return value

        return give

    def _enter(self, connecting: Connecting, before: Connecting | None) -> Callable[[], bool]:
        began = time.perf_counter()
        connected = self.views.connected(connecting)
        connected_at = time.perf_counter()
        checkpoints = self._checkpoints_in(connected)
        with lost_peers_named():
            entry = self._put_together(connecting.view, connected, checkpoints)
            agreed_at = time.perf_counter()
            loop = self._loop(connecting.view, connected, entry, checkpoints)
        self.views.attendance.entered(connecting.view.epoch)
        self._tell_of(connecting.view, connected, entry, (began, connected_at, agreed_at))
        context = self._announced(loop, connected)
        if connected.topology.rank == 0:
            explain_layout(context, entry.parts)
        return functools.partial(self._follow, loop, entry.live, connected, context)

    def _loop(self, view: View, connected: Connected, entry: _Entry, checkpoints: CheckpointSession) -> Loop:
        plan, live = connected.plan, entry.live
        turnover = self._turnover_in(view.epoch)
        exchange = build.build_exchange(entry.parts, connected, self._log, live.progress.step)
        copies = None
        if _needs_copies(connected):
            assert connected.aside is not None
            ring = Ring(connected.aside, keepers(connected.topology.nodes))
            copies = Copies(ring, live, self._held, plan.checkpoint.memory_every)
        return assemble(
            self._job, entry.parts, connected, exchange, checkpoints, live.progress, turnover, self._log,
            division=divide_as_planned(plan), cadence=None, gate=Gate(connected.world, live, copies), copies=copies,
        )  # fmt: skip

    def _follow(self, loop: Loop, live: Live, connected: Connected, context: Context) -> bool:
        def turn() -> None:
            live.progress = loop.progress
            self._pass_on(live, connected)

        try:
            return self._to_the_end(loop, context, turn)
        finally:
            live.progress, self._step = loop.progress, loop.progress.step
            loop.leave_view()
            self._dice = random_state.capture(self._device)
            self.views.pool.release()

    def _run(self, loop: Loop) -> str:
        with lost_peers_named():
            return loop.run()

    def _pass_on(self, live: Live, connected: Connected) -> None:
        """The shards of those who leave as planned go to some who stay, where these have no such shard. Collective."""
        world, grid, following = connected.world, connected.grid, self.views.latest
        assert self._current is not None
        assert following is not None
        seats = self._current.view.seats
        staying = {rank for rank, seat in enumerate(seats) if following.rank_of(seat) is not None}
        given = heirs([grid.index(rank, "shard") for rank in range(world.size)], staying)
        with failures_as_lost_peers("passing shards on"):
            heir = given.get(world.rank)
            own = None if heir is None else live.shard()
            sources = [leaver for leaver, taker in given.items() if taker == world.rank]
            self._held.keep(*send(world.everybody, own, set() if heir is None else {heir}, sources))
        world.sum([0.0])  # who leaves has to know that it is there

    def _put_together(self, view: View, connected: Connected, checkpoints: CheckpointSession) -> _Entry:
        """Put the state together, in a model that is divided over this view's ranks. Collective.

        Raises:
            PeerLostError: a rank vanished; what this rank held, it still holds.
            CheckpointError: a shard is lost, and there is no checkpoint to go back to.
        """
        world, grid, rank = connected.world, connected.grid, connected.topology.rank
        told = compare(world, self._held.labels)
        choice, last = choose(told), furthest(told)
        parts = build.build_parts(
            self._job, connected.plan, connected.topology, grid, self._device, world, connected.place
        )
        if self._dice is not None:
            random_state.restore(self._dice, self._device)
        if choice is None:
            origin, progress = self._from_disk(connected, parts, checkpoints, told)
        else:
            assert last is not None
            origin = _LIVE if choice.key == last else _MEMORY
            progress = self._regather(view, connected, parts, choice)
        live = Live(view.epoch, grid.size("shard"), grid.index(rank, "shard"), Source.of(parts), progress)
        self._held.add(live)
        world.sum([0.0])  # who has gone on from here needs no older state
        self._held.settle(told, needs_copies=_needs_copies(connected))
        if last is not None and last.step > progress.step and rank == 0:
            self._log.write("rolled_back", step=progress.step, from_step=last.step, state_from=origin)
        took = choice is not None and not told[rank]
        return _Entry(live, parts, origin, took)

    def _regather(self, view: View, connected: Connected, parts: Parts, choice: Choice) -> Progress:
        world, grid = connected.world, connected.grid
        own = self._held.of(choice)
        common = describe(world, choice, own)
        indices = [grid.index(rank, "shard") for rank in range(world.size)]
        label = Label(view.epoch, choice.key.step, grid.size("shard"), indices[world.rank])
        fresh = Shard.empty(label, common, parts.replica)
        shapes = {held.name: held.region.shape for held in parts.replica.parameters}
        move(world, choice, own, fresh, indices, shapes)
        return fresh.install(parts)

    def _from_disk(
        self, connected: Connected, parts: Parts, checkpoints: CheckpointSession, told: list[list[Label]]
    ) -> tuple[str, Progress]:
        """Nobody holds a complete state: the newest checkpoint's, or at the beginning the initial one. Collective."""
        last = furthest(told)
        has_trained = last is not None and last.step > 0
        if not has_trained and not self._start.resume:
            return _START, Progress()
        checkpoints.drain()
        connected.world.sum([0.0])
        state = checkpoints.restore(connected.grid.by_axis)
        if state is not None:
            return _DISK, restore(parts, state)
        if last is not None and has_trained:
            lost = ", ".join(map(str, missing(told, last)))
            raise CheckpointError(
                f"shard {lost} of {last.shards} is lost, of step {last.step} and of every copy in memory, and there is "
                "no checkpoint on disk; too many nodes were lost at once. Set checkpoint.every for a run that should "
                "survive that, or layout.replicate of 2 or more"
            )
        return _START, Progress()

    def _tell_of(self, view: View, connected: Connected, entry: _Entry, times: tuple[float, float, float]) -> None:
        began, connected_at, agreed_at = times
        self._log.write(
            "view",
            epoch=view.epoch,
            rank=connected.topology.rank,
            seats=list(view.seats),
            nodes=list(connected.topology.nodes),
            cause=view.cause,
            planned=view.planned,
            step=entry.live.progress.step,
            took_state=entry.took_state,
            givers=connected.world.size if entry.origin in (_LIVE, _MEMORY) else 0,
            replicate=connected.grid.size("replicate"),
            shard=connected.grid.size("shard"),
            state_from=entry.origin,
            connect_s=connected_at - began,
            state_s=agreed_at - connected_at,
            build_s=time.perf_counter() - agreed_at,
            lost_s=self.views.lost_s,
        )


def _needs_copies(connected: Connected) -> bool:
    """Whether the loss of one rank would take a shard with it, and the plan asks for copies."""
    several = connected.topology.world_size > 1
    return several and connected.grid.size("replicate") == 1 and connected.plan.checkpoint.memory_every > 0
