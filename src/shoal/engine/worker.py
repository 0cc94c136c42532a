"""The process of one rank: `python -m shoal.engine.worker RUN [--resume]`, started by a launcher or by torchrun.

It reads everything from the run directory, joins the others, trains, and reports its end as an event. Its exit code is
0 when training ended by itself and 1 when this rank failed or saw another fail; when its launcher goes away, it is
killed.
"""

from __future__ import annotations

import logging
import os
import resource
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from shoal.engine.validation import Validator
from shoal.errors import CheckpointError, JobError, MachineError, PeerLostError, RunError, ShoalError, user_traceback
from shoal.events import EventLog
from shoal.job.job import Job
from shoal.job.target import Target, code_of
from shoal.plan import Plan, load_plan, plan_hash
from shoal.run import Run
from shoal.strategy.layout.bubble import bubble
from shoal.strategy.layout.grid import Grid, arrange, explain
from shoal.strategy.topology import Topology
from shoal.wire.blocks import keep_large_blocks, return_large_blocks
from shoal.wire.rendezvous import Identity, Membership, identity_from, join, leave, start_collectives


def main() -> None:
    """Run one rank and end the process; nothing returns from here."""
    run, resume = Run(Path(sys.argv[1])), "--resume" in sys.argv[2:]
    identity = identity_from(os.environ)
    with EventLog(run.events / f"rank-{identity.rank}.jsonl", f"rank-{identity.rank}") as log:
        try:
            _work(run, identity, log, resume=resume)
            code = 0
        except BaseException as error:
            _report(_named(error, run), log)
            code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # not sys.exit: after a failure the communication thread may wait for a peer for ever


@dataclass(frozen=True)
class _Context:
    """What a rank knows once all have met."""

    run: Run
    plan: Plan
    target: Target
    membership: Membership
    topology: Topology
    device: torch.device
    log: EventLog


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
    context = _Context(run, plan, target, membership, topology, device, log)
    job = target.load()
    loop = _assemble(context, job, stop_request, resume=resume)
    if _is_roomy(loop.parts.replica, topology):
        keep_large_blocks()
    _announce(context, loop)
    if topology.rank == 0:
        _explain_layout(context, loop.parts)
    started = time.perf_counter()
    reason = loop.run()
    _conclude(context, loop, job, reason, time.perf_counter() - started)
    loop.close()
    leave(membership)


def _is_roomy(replica: Replica, topology: Topology) -> bool:
    """Whether the node's ranks' values, gradients and optimizer state fill less than a quarter of its memory."""
    size_bytes = sum(held.local.numel() * held.local.element_size() for held in replica.held)
    return 4 * size_bytes * len(topology.local_ranks) < psutil.virtual_memory().total / 4


def _assemble(context: _Context, job: Job, stop_request: control.StopRequest, *, resume: bool) -> Loop:
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
    plan: Plan, parts: build.Parts, exchange: ReplicaExchange, context: _Context, progress: Progress
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


def _announce(context: _Context, loop: Loop) -> None:
    plan, target, topology = context.plan, context.target, context.topology
    parts = loop.parts
    context.log.write(
        "run_started",
        plan_hash=plan_hash(plan),
        job=target.name,
        arguments=dict(target.arguments),
        world_size=topology.world_size,
        node=topology.nodes[topology.rank],
        device=str(context.device),
        num_parameters=parts.replica.num_values,
        steps_per_epoch=parts.loader.steps_per_epoch,
        torch=torch.__version__,
        shoal=__version__,
        stop={
            "steps": plan.stop.steps,
            "epochs": plan.stop.epochs,
            "seconds": plan.stop.seconds,
            "until": plan.stop.until,
            "patience": plan.stop.patience or None,
        },
    )


def _explain_layout(context: _Context, parts: build.Parts) -> None:
    """Tell where each axis came to lie and what became of the model."""
    plan, nodes = context.plan, context.topology.nodes
    if plan.layout.ranks_per_replica == 1:
        return
    sentences = explain(arrange(plan.layout, nodes), nodes)
    if parts.pipeline is not None:
        stages = (f"{names[0]} to {names[-1]}" for names in parts.pipeline[0].layers)
        sentences.append(f"the pipeline's stages, by measured time and memory: {'; '.join(stages)}")
    if parts.left_whole:
        reasons = (f"{name} ({reason})" for name, reason in parts.left_whole.items())
        sentences.append(f"whole on every rank of the tensor axis: {'; '.join(reasons)}")
    context.log.write("layout", sentences=sentences)


def _conclude(context: _Context, loop: Loop, job: Job, reason: str, seconds: float) -> None:
    log = context.log
    if context.topology.rank == 0 and job.sample is not None and loop.parts.replica.is_whole:
        _show_sample(loop, job, log)
    progress = loop.progress
    if loop.parts.pipeline is not None:
        line, _ = loop.parts.pipeline
        log.write("bubble", measured=line.bubble, theoretical=bubble(context.plan.layout))
    log.write(
        "run_finished",
        reason=reason,
        steps=progress.step,
        samples=progress.samples,
        seconds=seconds,
        loss=progress.loss,
        val_loss=progress.val_loss,
        peak_memory_bytes=_peak_memory_bytes(),
        bytes_sent=loop.bytes_sent,
        traffic=loop.traffic.to_plain(),
    )
    if loop.unsaved is not None:
        raise CheckpointError(f"the final state could not be saved: {loop.unsaved}")


def _show_sample(loop: Loop, job: Job, log: EventLog) -> None:
    assert job.sample is not None
    model = loop.parts.model.eval()
    try:
        with torch.no_grad():
            log.write("sample", text=str(job.sample(model)))
    except Exception as error:  # the training is done and saved: what the user's function does must not spoil it
        log.write("warning", message=f"the job's sample function raised {type(error).__name__}: {error}")


def _peak_memory_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _named(error: BaseException, run: Run) -> BaseException:
    """Out of memory in the words of this machine and plan; any other error as it is."""
    words = str(error)
    if not (isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in words):
        return error
    layout, here = load_plan(run.plan).layout, psutil.virtual_memory()
    hints = ["a smaller batch.size, or more batch.accumulate"]
    hints += ["layout.recompute = true"] if not layout.recompute and layout.ranks_per_replica > 1 else []
    hints.append(f"layout.shard = {2 * layout.shard} or more: a rank then holds half as much of the model")
    return MachineError(
        f"out of memory on node {identity_from(os.environ).node}: this rank held {_peak_memory_bytes() / 1e9:.1f} GB "
        f"at most, and {here.available / 1e9:.1f} of the machine's {here.total / 1e9:.1f} GB are free "
        f"({words.partition(chr(10))[0][:200]}). Try {'; '.join(hints)}"
    )


def _report(error: BaseException, log: EventLog) -> None:
    text = "".join(traceback.format_exception(error))
    print(text, file=sys.stderr, flush=True)
    trace = "" if isinstance(error, ShoalError) else user_traceback(error)
    fields: dict[str, Any] = {"error": type(error).__name__, "message": str(error), "traceback": trace}
    fields["symptom"] = isinstance(error, PeerLostError)
    log.write("error", **fields)


if __name__ == "__main__":
    main()
