"""A rank among as many as there are from beginning to end: when one fails, the run ends."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

import psutil

from shoal.engine import build
from shoal.engine.assemble import assemble, divide_as_planned, keep_cadence
from shoal.engine.checkpoint.archive import Archive
from shoal.engine.checkpoint.session import CheckpointSession
from shoal.engine.experience import Experience
from shoal.engine.garbage import spare_what_lasts
from shoal.engine.layout.replica import Replica
from shoal.engine.loop import Loop
from shoal.engine.progress import Progress
from shoal.engine.restoring import restore, restore_private
from shoal.engine.start import Start, fingerprint, target_of_run
from shoal.engine.telling import Context, announce, conclude, explain_layout
from shoal.engine.turnover import Turnover
from shoal.job.job import Job
from shoal.plan import load_plan
from shoal.strategy.layout.grid import arrange
from shoal.strategy.topology import Topology
from shoal.wire.blocks import keep_large_blocks, return_large_blocks
from shoal.wire.rendezvous import connect, identity_from, join, leave, start_default_group

DISK_PATIENCE_S = 0.0
"""For how long the event log may be refused: whatever fails ends the run."""


def seat_from(env: Mapping[str, str]) -> int:
    """This process's rank."""
    return identity_from(env).rank


def node_from(env: Mapping[str, str]) -> str:
    """The name of this process's node."""
    return identity_from(env).node


def work(start: Start) -> None:
    """Join, train, and leave with all others."""
    plan = load_plan(start.run.plan)
    target = target_of_run(start.run)
    membership = join(identity_from(os.environ), fingerprint(plan, target))
    topology = Topology(start.seat, membership.nodes)
    device = build.choose_device(plan.compute, topology)
    build.set_threads(plan.compute, topology)
    divides = plan.layout.ranks_per_replica > 1
    # A model that is divided may be large: until its size is known, what is free is not kept.
    (return_large_blocks if divides else keep_large_blocks)()
    world = connect(membership, device)
    if divides:
        start_default_group(membership, device)
    context = Context(start.run, plan, target, world, topology, device, start.log, start.seat)
    job = target.load()
    loop = _assemble(context, job, start)
    if _is_roomy(loop.parts.replica, topology):
        keep_large_blocks()
    spare_what_lasts()
    announce(context, loop)
    if topology.rank == 0:
        explain_layout(context, loop.parts)
    started = time.perf_counter()
    reason = loop.run()
    conclude(context, loop, job, reason, time.perf_counter() - started)
    loop.close()
    leave(membership, world)


def _is_roomy(replica: Replica, topology: Topology) -> bool:
    """Whether the node's ranks' values, gradients and optimizer state fill less than a quarter of its memory."""
    size_bytes = sum(held.local.numel() * held.local.element_size() for held in replica.held)
    return 4 * size_bytes * len(topology.local_ranks) < psutil.virtual_memory().total / 4


def _assemble(context: Context, job: Job, start: Start) -> Loop:
    plan, topology, device, log = context.plan, context.topology, context.device, context.log
    grid = arrange(plan.layout, topology.nodes)
    parts = build.build_parts(job, plan, topology, grid, device, context.world)
    archive = Archive(context.run.checkpoints, keep=plan.checkpoint.keep, keep_best=plan.checkpoint.best)
    checkpoints = CheckpointSession(context.world, archive, log, device)
    state = checkpoints.restore(grid.by_axis) if start.resume else None
    progress = restore(parts, state) if state else Progress()
    connected = build.connect_lanes(plan, topology, context.world, device)
    exchange = build.build_exchange(parts, connected, log)
    private = checkpoints.restore_private() if state else None
    if private is not None:
        restore_private(parts, exchange, private)
    if topology.rank == 0:
        for message in build.no_effect(connected, parts, job):
            log.write("warning", message=message)
    known = Experience.from_state(state)
    return assemble(
        job, parts, connected, exchange, checkpoints, progress, Turnover(start.stop_request), log,
        division=divide_as_planned(plan, known=known.speeds_of(topology.world_size)),
        cadence=keep_cadence(connected, progress, log, known),
    )  # fmt: skip
