"""A rank among others that come and go.

It attends to a coordinator, which says who trains together: a *view*. When a member is lost, the others drop the step
at hand, connect anew and go on from the last step that was committed; nobody starts again. When a member joins or
leaves as planned, the next view's connections are made while this one trains on, and all turn to it after the same
step.

What lasts as long as this process: the model, the optimizer, the data, the checkpoint writer. What lasts as long as a
view: connections, buckets of gradients, the loop. Where several ranks hold one replica, `shards/rank.py` does this.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import time
from collections.abc import Callable, Mapping

import torch

from shoal.cluster.views import View
from shoal.engine import build, random_state
from shoal.engine.assemble import assemble, divide_as_planned, keep_cadence
from shoal.engine.build import Connected, Parts
from shoal.engine.checkpoint.session import CheckpointSession
from shoal.engine.division import Division
from shoal.engine.exchange import UNEQUAL
from shoal.engine.exchange.gradients import GradientExchange
from shoal.engine.experience import Experience
from shoal.engine.garbage import spare_what_lasts
from shoal.engine.loop import Loop
from shoal.engine.progress import Progress
from shoal.engine.replicas import make_equal
from shoal.engine.restoring import restore
from shoal.engine.shards.rank import ShardedRank
from shoal.engine.start import Start
from shoal.engine.telling import Context
from shoal.engine.views.apart import Carried, among, go_on_apart, settle_apart
from shoal.engine.views.attending import AttendingRank
from shoal.engine.views.connecting import Connecting
from shoal.engine.views.course import Course, Crossing
from shoal.engine.views.farewell import save_alone
from shoal.engine.views.following import COORDINATOR, Following
from shoal.engine.views.handover import Outcome, hand_over
from shoal.engine.views.newcomer import Newcomer
from shoal.errors import PeerLostError, RendezvousError, RunEnded
from shoal.job.job import Job
from shoal.plan import Plan, for_ranks, load_plan
from shoal.strategy.layout.grid import arrange
from shoal.strategy.topology import Topology
from shoal.wire.blocks import keep_large_blocks
from shoal.wire.groups import failures_as_lost_peers

_SEAT, _NODE = "SHOAL_SEAT", "SHOAL_NODE"


DISK_PATIENCE_S = 60.0
"""For how long the event log may be refused: a disk that is full for a while stops nobody."""


def is_asked_for(env: Mapping[str, str]) -> bool:
    """Whether this process was started to attend to a coordinator."""
    return COORDINATOR in env


def seat_from(env: Mapping[str, str]) -> int:
    """This process's seat.

    Raises:
        RendezvousError: the variable is missing or no number.
    """
    try:
        return int(env[_SEAT])
    except (KeyError, ValueError):
        raise RendezvousError(
            f"environment variable {_SEAT} is {env.get(_SEAT)!r}, expected this worker's number among all; start "
            "workers with `shoal train` or `shoal join`"
        ) from None


def node_from(env: Mapping[str, str]) -> str:
    """The name of this process's node."""
    return env.get(_NODE) or os.uname().nodename


def work(start: Start) -> None:
    """Attend, train through view after view, and leave."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # until this worker is a member, and has to hand over first
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"  # loader processes are forked, and never talk to the coordinator
    sharded = load_plan(start.run.plan).layout.shard > 1
    rank = ShardedRank(start, node_from(os.environ), os.environ) if sharded else _ElasticRank(start, os.environ)
    try:
        rank.train()
    except PeerLostError:
        raise
    except RunEnded as end:
        if end.failed:
            raise
        start.log.write("left", step=0)  # training came to its end while this worker waited for a place
    except BaseException as error:
        rank.views.attendance.failed(f"seat {start.seat}: {type(error).__name__}: {error}")
        raise
    finally:
        rank.views.attendance.close()


class _ElasticRank(AttendingRank):
    """One that holds a whole replica."""

    def __init__(self, start: Start, env: Mapping[str, str]) -> None:
        """Make the job's parts, and say hello."""
        here = Topology(0, (node_from(env),))
        super().__init__(start, here.nodes[0], env)
        keep_large_blocks()
        self._parts = _parts(self._job, self._plan, here, self._device, start.seat)
        self._progress: Progress | None = None
        self._course: Course | None = None
        self._carried = Carried()
        self._fills_servers = False
        self._apart = self._plan.sync.kind in UNEQUAL
        self._experience = Experience()
        self._node = here.nodes[0]
        self._patience = self._watch()
        spare_what_lasts()
        self.views = Following(start, self._plan, self._target, self._device, self._node, env, self._way_out)

    def _stop_waiting(self) -> None:
        """Asked to stop while too few are left: nobody else may hold what this rank holds."""
        step = self._progress.step if self._progress else 0
        if self._progress is None or self._started is None or self._plan.sync.kind != "allreduce":
            self._warn_of_stopping(step)
        else:
            save_alone(
                self._start, self._plan, self._target, self._job, self._parts, self._progress, self._device,
                self._node,
            )  # fmt: skip
        self._log.write("left", step=step)

    def _enter(self, connecting: Connecting, before: Connecting | None) -> Callable[[], bool]:
        began, view = time.perf_counter(), connecting.view
        connected = self.views.connected(connecting)
        connected_at = time.perf_counter()
        checkpoints = self._checkpoints_in(connected)
        turnover = self._turnover_in(view.epoch)
        outcome = self._take_state(connected, checkpoints)
        assert outcome.progress is not None
        if self._apart:
            assert self._progress is not None
            crossing = Crossing(
                job=self._job, parts=self._parts, course=self._course, world=connected.world, checkpoints=checkpoints,
                turnover=turnover, log=self._log,
            )  # fmt: skip
            go_on_apart(crossing, self._carried, outcome, self._progress, self._start, connected.plan, view)
            self._progress = outcome.progress  # before anything else can fail: those steps are taken
            settle_apart(crossing, self._carried, outcome, view)
        num_lost = self._share_experience(connected, outcome, before, view)
        connected, division = self._divided(view, connected, outcome)
        parts = self._parts
        cadence = keep_cadence(connected, outcome.progress, self._log, self._experience)
        if cadence is not None:
            cadence.lost(num_lost)
        self._course = Course(
            epoch=view.epoch, seats=view.seats, connected=connected, loader=parts.loader, start=outcome.progress
        )
        agreed_at = time.perf_counter()
        exchange = build.build_exchange(
            parts, connected, self._log, outcome.progress.step, among(self._start.run, self._plan, view),
            self._carried.ledger,
        )  # fmt: skip
        if self._fills_servers:
            held = checkpoints.restore_private(0)  # rank 0 kept it for all
            exchange.load_state_dict({**(held or {}), "coder": None})
            self._fills_servers = False
        newcomer = None
        if outcome.taking is not None:
            assert isinstance(exchange, GradientExchange)
            newcomer = Newcomer(outcome.taking, parts, exchange)
        loop = assemble(
            self._job, parts, connected, exchange, checkpoints, outcome.progress, turnover, self._log,
            division=division, midway=self._carried.midway, cadence=cadence, newcomer=newcomer, giving=outcome.giving,
            patience=self._patience,
        )  # fmt: skip
        self.views.attendance.entered(view.epoch)
        self._tell_of(view, connected, outcome, began, connected_at, agreed_at)
        context = self._announced(loop, connected)
        return functools.partial(self._follow, loop, context, outcome)

    def _follow(self, loop: Loop, context: Context, outcome: Outcome) -> bool:
        outcome.begin()
        try:
            return self._to_the_end(loop, context, self._settle)
        finally:
            self._progress = loop.progress if loop.has_state else None
            self._carried.midway = loop.midway
            self._experience = loop.experience
            loop.leave_view()
            self.views.pool.release()

    def _settle(self) -> None:
        assert self._course is not None
        self._course = dataclasses.replace(self._course, settled=True)

    def _share_experience(self, connected: Connected, outcome: Outcome, before: Connecting | None, view: View) -> int:
        """All go on with what one of those has learned who were there; return how many members were lost."""
        plan, world, teller = connected.plan, connected.world, outcome.roles.teller
        if teller is None or not (plan.batch.balance or plan.checkpoint.every == "auto"):
            return 0
        text = None
        if world.rank == teller:
            lost = set(before.view.members) - set(view.members) if before is not None and not view.planned else set()
            text = json.dumps({"experience": self._experience.to_plain(), "lost": len(lost)}).encode()
        with failures_as_lost_peers("telling what was learned"):
            told = json.loads(world.tell(text, teller))
        self._experience = Experience(**told["experience"])
        return int(told["lost"])

    def _divided(self, view: View, connected: Connected, outcome: Outcome) -> tuple[Connected, Division]:
        """Who has no state yet takes no samples; the others take as many as each other, or as they are known to do."""
        plan, cold = connected.plan, outcome.roles.takers if connected.aside is not None else []
        division = divide_as_planned(plan, cold=cold, seats=view.seats, known=self._experience.speeds)
        batch = dataclasses.replace(plan.batch, shares=division.shares)
        connected = dataclasses.replace(connected, plan=dataclasses.replace(plan, batch=batch))
        loader = self._parts.loader.divided(division.shares, connected.topology.rank)
        self._parts = dataclasses.replace(self._parts, loader=loader)
        return connected, division

    def _take_state(self, connected: Connected, checkpoints: CheckpointSession) -> Outcome:
        """Give all ranks of the view a state: what some of them hold, a checkpoint's, or one initial model."""
        world = connected.world
        epoch = self._course.epoch if self._course else 0
        outcome = hand_over(
            world, self._parts, self._progress, connected.aside,
            epoch=epoch, apart=self._apart, midway=self._carried.midway is not None,
        )  # fmt: skip
        reached, roles = outcome.progress, outcome.roles
        if reached is None:
            state = checkpoints.restore(connected.grid.by_axis) if self._start.resume else None
            make_equal(self._parts.model, world.everybody)
            reached = restore(self._parts, state) if state else Progress()
            self._experience = Experience.from_state(state)
            self._fills_servers = state is not None and self._plan.sync.kind == "parameter_server"
            outcome = dataclasses.replace(outcome, progress=reached)
        if not self._apart or world.rank in roles.takers or self._progress is None:
            self._progress = reached if outcome.taking is None else None
        for rank in roles.differing:
            if world.rank == roles.teller:
                self._log.write(
                    "warning",
                    message=f"rank {rank} held other parameters than the rest after the same step {reached.step}; it "
                    "was given theirs",
                )
        return outcome

    def _tell_of(
        self, view: View, connected: Connected, outcome: Outcome, began: float, connected_at: float, agreed_at: float
    ) -> None:
        assert outcome.progress is not None
        roles, now = outcome.roles, time.perf_counter()
        self._log.write(
            "view",
            epoch=view.epoch,
            rank=connected.topology.rank,
            seats=list(view.seats),
            nodes=list(connected.topology.nodes),
            cause=view.cause,
            planned=view.planned,
            step=outcome.progress.step,
            took_state=connected.topology.rank in roles.takers,
            givers=len(roles.givers),
            connect_s=connected_at - began,
            state_s=agreed_at - connected_at,
            build_s=now - agreed_at,
            lost_s=self.views.lost_s,
        )


def _parts(job: Job, plan: Plan, here: Topology, device: torch.device, seat: int) -> Parts:
    """The job's parts as this rank alone would have them; random numbers of its own from here on."""
    alone = for_ranks(plan, 1)
    parts = build.build_parts(job, alone, here, arrange(alone.layout, here.nodes), device, None)
    random_state.seed_all(plan.seed, seat + 1)
    return parts
