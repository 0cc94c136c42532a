"""The process of one rank: `python -m shoal.engine.worker RUN [--resume]`, started by a launcher or by torchrun.

It reads everything from the run directory, joins the others, trains, and reports its end as an event. Its exit code is
0 when training ended by itself and 1 when this rank failed or saw another fail; when its launcher goes away, it is
killed.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path

import psutil
import torch

from shoal._version import __version__
from shoal.engine import build, control
from shoal.engine.checkpoint.archive import Archive
from shoal.engine.checkpoint.session import CheckpointSession
from shoal.engine.computation import Computation, Direct
from shoal.engine.exchange import ReplicaExchange
from shoal.engine.forward import Forward
from shoal.engine.layout.pipeline.forward import Pipelined, PipelinedForward
from shoal.engine.layout.replica import Replica
from shoal.engine.loop import Crew, Loop, LoopConfig, restore, restore_private
from shoal.engine.pace import InStep, OwnPace
from shoal.engine.progress import Progress
from shoal.engine.stopping import StopRule
from shoal.engine.telling import Context, announce, conclude, explain_layout, named, report
from shoal.engine.validation import Validator
from shoal.errors import JobError, RunError
from shoal.events import EventLog
from shoal.job.job import Job
from shoal.job.target import Target, code_of
from shoal.plan import Plan, load_plan, plan_hash
from shoal.run import Run
from shoal.strategy.layout.grid import Grid, arrange
from shoal.strategy.topology import Topology
from shoal.wire.blocks import keep_large_blocks, return_large_blocks
from shoal.wire.rendezvous import Identity, identity_from, join, leave, start_collectives


def main() -> None:
    """Run one rank and end the process; nothing returns from here."""
    run, resume = Run(Path(sys.argv[1])), "--resume" in sys.argv[2:]
    identity = identity_from(os.environ)
    with EventLog(run.events / f"rank-{identity.rank}.jsonl", f"rank-{identity.rank}") as log:
        try:
            _work(run, identity, log, resume=resume)
            code = 0
        except BaseException as error:
            report(named(error, run, identity.node), log)
            code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # not sys.exit: after a failure the communication thread may wait for a peer for ever


def _work(run: Run, identity: Identity, log: EventLog, *, resume: bool) -> None:
    logging.captureWarnings(True)
    stop_request = control.listen(os.environ)
    plan = load_plan(run.plan)
    target = target_of_run(run)
    membership = join(identity, _fingerprint(plan, target))
    topology = Topology(identity.rank, membership.nodes)
    device = build.choose_device(plan.compute, topology)
    build.set_threads(plan.compute, topology)
    # A model that is divided may be large: until its size is known, what is free is not kept.
    (keep_large_blocks if plan.layout.ranks_per_replica == 1 else return_large_blocks)()
    start_collectives(membership, device)
    context = Context(run, plan, target, membership, topology, device, log)
    job = target.load()
    loop = _assemble(context, job, stop_request, resume=resume)
    if _is_roomy(loop.parts.replica, topology):
        keep_large_blocks()
    announce(context, loop)
    if topology.rank == 0:
        explain_layout(context, loop.parts)
    started = time.perf_counter()
    reason = loop.run()
    conclude(context, loop, job, reason, time.perf_counter() - started)
    loop.close()
    leave(membership)


def _is_roomy(replica: Replica, topology: Topology) -> bool:
    """Whether the node's ranks' values, gradients and optimizer state fill less than a quarter of its memory."""
    size_bytes = sum(held.local.numel() * held.local.element_size() for held in replica.held)
    return 4 * size_bytes * len(topology.local_ranks) < psutil.virtual_memory().total / 4


def _assemble(context: Context, job: Job, stop_request: control.StopRequest, *, resume: bool) -> Loop:
    plan, topology, device, log = context.plan, context.topology, context.device, context.log
    rank, world_size = topology.rank, topology.world_size
    grid = arrange(plan.layout, topology.nodes)
    parts = build.build_parts(job, plan, topology, grid, device)
    archive = Archive(context.run.checkpoints, keep=plan.checkpoint.keep, keep_best=plan.checkpoint.best)
    checkpoints = CheckpointSession(context.membership.store, rank, world_size, archive, log, device)
    state = checkpoints.restore(grid.by_axis) if resume else None
    progress = restore(parts, state) if state else Progress()
    exchange = build.build_exchange(plan, parts, topology, grid, context.membership, device, log)
    private = checkpoints.restore_private() if state else None
    if private is not None:
        restore_private(parts, exchange, private)
    forward, computation = _computation(plan, job, parts, device)
    if rank == 0:
        for message in build.no_effect(plan, topology, grid, parts, job):
            log.write("warning", message=message)
    crew = Crew(
        parts=parts,
        computation=computation,
        exchange=exchange,
        checkpoints=checkpoints,
        validator=_validator(plan, job, parts, forward, grid, rank),
        pace=_pace(plan, parts, exchange, context, progress),
        stop_rule=StopRule(plan.stop),
        stop_request=stop_request,
        log=log,
    )
    return Loop(_loop_config(plan, grid, rank), crew, progress)


def _computation(plan: Plan, job: Job, parts: build.Parts, device: torch.device) -> tuple[Forward, Computation]:
    forward = Forward(parts.model, job.loss, device, plan.compute.precision)
    if parts.pipeline is None:
        return forward, Direct(forward, parts.replica)
    line, traced = parts.pipeline
    pipelined = PipelinedForward(forward, line, traced)
    return pipelined, Pipelined(pipelined, line, parts.replica)


def _loop_config(plan: Plan, grid: Grid, rank: int) -> LoopConfig:
    assert plan.batch.shares is not None
    return LoopConfig(
        rank=rank,
        weight=plan.batch.shares[grid.feed(rank)] / sum(plan.batch.shares) / plan.layout.tensor,
        clip_norm=plan.compute.clip_norm,
        validate_every=plan.validation.every,
        checkpoint_every=plan.checkpoint.every,
        keep_best=plan.checkpoint.best,
        layout=grid.by_axis,
        writes_pieces=grid.index(rank, "replicate") == 0,
    )


def _pace(
    plan: Plan, parts: build.Parts, exchange: ReplicaExchange, context: Context, progress: Progress
) -> InStep | OwnPace:
    if not exchange.asynchronous:
        return InStep(parts.loader, progress)
    store = context.membership.store.clone()  # type: ignore[attr-defined]  # a client waits with its lock held
    periods = (plan.validation.every if parts.validation is not None else 0, plan.checkpoint.every)
    return OwnPace(store, parts.loader, context.topology.world_size, periods, plan.stop.steps)


def _validator(plan: Plan, job: Job, parts: build.Parts, forward: Forward, grid: Grid, rank: int) -> Validator | None:
    if parts.validation is None:
        if plan.stop.until or plan.stop.patience:
            raise JobError(
                "stop.until and stop.patience look at validation, but the job's data has no validation part; return a "
                "pair (training, validation)"
            )
        return None
    return Validator(
        dataset=parts.validation,
        forward=forward,
        metrics=job.metrics,
        rank=grid.feed(rank),
        world_size=grid.feeds,
        batch_size=-(-plan.batch.size // (grid.feeds * plan.batch.accumulate)),
        limit=plan.validation.samples,
        collate=job.collate,
        shards=plan.layout.shard,
    )


def target_of_run(run: Run) -> Target:
    """The job that a run trains, with its arguments.

    Raises:
        RunError: the run directory does not say.
    """
    info = run.read_info()
    try:
        name = str(info["job"])
        return Target(name=name, arguments=dict(info["arguments"]), code=code_of(name))
    except KeyError as missing:
        raise RunError(f"{run.path / 'run.json'} has no {missing.args[0]!r}; is it another version's?") from None


def _fingerprint(plan: Plan, target: Target) -> dict[str, str]:
    return {
        "plan hash": plan_hash(plan),
        "job": f"{target.name.rpartition('/')[2]} {dict(target.arguments)}",
        "code": target.code[:12],
        "shoal version": __version__,
        "torch version": torch.__version__,
    }


if __name__ == "__main__":
    main()
