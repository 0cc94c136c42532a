"""The last word of a rank that waits for others and is asked to stop or to leave: it saves what it holds, by itself.

Of several that wait, whoever comes first does it; the others find the step saved. Only where all replicas are equal.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
from collections.abc import Iterator

import torch
import torch.distributed as dist

from shoal.engine import build
from shoal.engine.assemble import assemble
from shoal.engine.build import Parts
from shoal.engine.checkpoint.archive import Archive
from shoal.engine.checkpoint.session import CheckpointSession
from shoal.engine.progress import Progress
from shoal.engine.start import Start
from shoal.engine.telling import Context, conclude, require_saved
from shoal.engine.turnover import Turnover
from shoal.job.job import Job
from shoal.job.target import Target
from shoal.plan import Plan, for_ranks
from shoal.run import Run
from shoal.strategy.topology import Topology
from shoal.wire.groups import World

_ALONE = 1.0


def save_alone(
    start: Start,
    plan: Plan,
    target: Target,
    job: Job,
    parts: Parts,
    progress: Progress,
    device: torch.device,
    node: str,
) -> None:
    """Validate and save the state of the last committed step, unless another rank has.

    Raises:
        CheckpointError: it could not be saved.
    """
    with _turn(start.run):
        archive = Archive(start.run.checkpoints, keep=plan.checkpoint.keep, keep_best=plan.checkpoint.best)
        is_saved = any(saved.step >= progress.step for saved in archive.list())
        world = World(dist.HashStore(), 0, 1, device)
        world.connect()
        topology, alone = Topology(0, (node,)), for_ranks(plan, 1)
        connected = build.connect_lanes(alone, topology, world, device)
        parts = dataclasses.replace(parts, loader=parts.loader.divided((_ALONE,), 0))
        checkpoints = CheckpointSession(world, archive, start.log, device)
        exchange = build.build_exchange(parts, connected, start.log, progress.step)
        turnover = Turnover(start.stop_request)
        loop = assemble(job, parts, connected, exchange, checkpoints, progress, turnover, start.log)
        if not is_saved:
            loop.finish()
        context = Context(start.run, alone, target, world, topology, device, start.log, start.seat)
        if start.stop_request:
            conclude(context, loop, job, "interrupted", 0.0)
        require_saved(loop)  # and nothing more where others may still come, and go on
        loop.close()


@contextlib.contextmanager
def _turn(run: Run) -> Iterator[None]:
    """One rank after the other, of those that see the same folder."""
    with (run.path / ".saving").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
