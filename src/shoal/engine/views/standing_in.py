"""What becomes of a step that a loss has cut in two, where parameter servers count the steps of their workers.

In bsp a step counts when the servers have every worker's update of it, in ssp each by itself. A worker that is lost may
have brought its update to some servers, or to some of a server's keys, and not to the others. Whatever is missing is
brought by those who are left, in its name: the lost worker's parts of batches are known, and in bsp those who wait for
it still hold the very values that it computed with. So no step is undone, no sample lost, and nothing counts twice: an
update that is there already is passed over, key by key. Only then are the servers told who trains from now on.

The furthest worker does the lost ones' steps; one that is behind does its own. In ssp the values are as old as that
worker's, which the bound allows anyhow.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shoal.engine.assemble import assemble
from shoal.engine.exchange.base import Among
from shoal.engine.exchange.in_name import InName
from shoal.engine.exchange.server_access import server_client
from shoal.engine.progress import Progress
from shoal.engine.views.course import Course, Crossing
from shoal.engine.views.handover import Outcome
from shoal.events import EventLog
from shoal.job.sparse_table import sparse_tables
from shoal.strategy.sync.parameter_server import ParameterServerConfig
from shoal.wire.groups import failures_as_lost_peers


@dataclass(frozen=True)
class Owed:
    """Steps `first` to `last` - 1, counted from 0, of one who trained in the view before."""

    seat: int
    first: int
    last: int


def owed(course: Course, clocks: Mapping[int, int], standings: Mapping[int, int], last: int) -> list[Owed]:
    """What the servers may lack of the steps before `last`.

    Args:
        clocks: by seat, the steps that are in the values of all keys; whoever is not named has none in this view.
        standings: by seat, the steps that those who go on have pushed.
    """
    found = []
    for seat in course.seats:
        first = standings[seat] if seat in standings else max(clocks.get(seat, 0), course.start.step)
        if first < last:
            found.append(Owed(seat, first, last))
    return found


@dataclass(frozen=True, kw_only=True)
class StandingIn(Crossing):
    """One rank's part in it. A newcomer has nothing to bring."""

    among: Among

    def bring(self, seat: int, outcome: Outcome, keeping: Mapping[int, int], last: int) -> None:
        """Bring what is owed of the steps before `last`. Collective.

        Args:
            seat: this rank's.
            keeping: by seat, the steps that those who go on have pushed.

        Raises:
            PeerLostError: another rank vanished meanwhile; it may be done again in the next view.
        """
        if outcome.roles.teller is None:
            return
        is_teller = self.world.rank == outcome.roles.teller
        text = json.dumps(self._clocks(seat)).encode() if is_teller else None
        with failures_as_lost_peers("asking what the servers have"):
            told = json.loads(self.world.tell(text, outcome.roles.teller))
        clocks = {int(s): clock for s, clock in told.items()}
        for steps in owed(self.course, clocks, keeping, last) if self.course is not None else []:
            if steps.seat == seat and seat in keeping:
                self._take(steps, self.log, fetches=True)
            elif is_teller and steps.seat not in keeping:
                self._take(steps, _Renamed(self.log, steps.seat), fetches=False)
                self.log.write("stood_in", seat=steps.seat, first_step=steps.first + 1, last_step=steps.last)
        self.world.sum([0.0])

    @property
    def _config(self) -> ParameterServerConfig:
        assert self.course is not None
        config = self.course.connected.plan.sync
        assert isinstance(config, ParameterServerConfig)
        return config

    def _clocks(self, seat: int) -> dict[int, int]:
        client = server_client(self.parts.replica, self._config, self.among, worker=seat, log=self.log.write)
        try:
            return client.clocks()
        finally:
            client.close()

    def _take(self, steps: Owed, log: Any, *, fetches: bool) -> None:
        course, replica = self.course, self.parts.replica
        assert course is not None
        rank, size = course.seats.index(steps.seat), len(course.seats)
        client = server_client(replica, self._config, self.among, worker=steps.seat, log=self.log.write, in_name=True)
        try:
            exchange = InName(
                replica, client, dict(sparse_tables(replica.model)), rank, size,
                sums=self._config.mode == "bsp", fetches=fetches,
            )  # fmt: skip
            topology = dataclasses.replace(course.connected.topology, rank=rank)
            connected = dataclasses.replace(course.connected, world=self.world, topology=topology)
            loader = course.loader.divided(connected.plan.batch.shares or (), rank)
            own = dataclasses.replace(self.parts, loader=loader, schedule=self.parts.schedule if fetches else None)
            loop = assemble(
                self.job, own, connected, exchange, self.checkpoints, self._before(steps.first), self.turnover, log
            )
            loop.take_steps(steps.last)
        finally:
            client.close()

    def _before(self, step: int) -> Progress:
        assert self.course is not None
        start = self.course.start
        cursor, samples = self.course.loader.after(start.cursor, step - start.step)
        return dataclasses.replace(start, step=step, cursor=cursor, samples=start.samples + samples)


@dataclass(frozen=True)
class _Renamed:
    """The log, where another's steps are told as such."""

    log: EventLog
    seat: int

    def write(self, kind: str, /, **fields: Any) -> None:
        """Append one event."""
        if kind == "step":
            self.log.write("step_in_name", seat=self.seat, **fields)
        else:
            self.log.write(kind, **fields)
