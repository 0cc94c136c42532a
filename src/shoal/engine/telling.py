"""What a rank tells of its run in the event log: its beginning, how the model lies, its end, and why it failed."""

from __future__ import annotations

import resource
import sys
import traceback
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from shoal._version import __version__
from shoal.engine import build
from shoal.engine.loop import Loop
from shoal.engine.memory import is_out_of_memory
from shoal.errors import CheckpointError, MachineError, PeerLostError, RunEnded, ShoalError, user_traceback
from shoal.events import EventLog
from shoal.job.job import Job
from shoal.job.target import Target
from shoal.plan import Plan, load_plan, plan_hash
from shoal.run import Run
from shoal.strategy.layout.bubble import bubble
from shoal.strategy.layout.grid import arrange, explain
from shoal.strategy.topology import Topology
from shoal.wire.groups import World


@dataclass(frozen=True)
class Context:
    """What a rank knows once all have met; `seat` names it for as long as it lives, whatever its rank."""

    run: Run
    plan: Plan
    target: Target
    world: World
    topology: Topology
    device: torch.device
    log: EventLog
    seat: int


def announce(context: Context, loop: Loop) -> None:
    """Training begins."""
    plan, target, topology = context.plan, context.target, context.topology
    parts = loop.parts
    context.log.write(
        "run_started",
        attempt=context.run.read_info().get("id"),
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


def explain_layout(context: Context, parts: build.Parts) -> None:
    """Tell where each axis came to lie and what became of the model."""
    plan, nodes = context.plan, context.topology.nodes
    if plan.layout.ranks_per_replica == 1:
        return
    sentences = explain(arrange(plan.layout, nodes), nodes)
    replica = parts.replica
    locals_ = [held.local for held in replica.held]
    own, own_bytes = sum(p.numel() for p in locals_), sum(p.numel() * p.element_size() for p in locals_)
    sentences.append(
        f"rank 0 holds {own:,} of {replica.num_values:,} numbers: {own_bytes / 1e9:.3g} GB of values, as much of "
        "gradients, and twice as much of state under an optimizer like AdamW"
    )
    if parts.pipeline is not None:
        stages = (f"{names[0]} to {names[-1]}" for names in parts.pipeline[0].layers)
        sentences.append(f"the pipeline's stages, by measured time and memory: {'; '.join(stages)}")
    if parts.left_whole:
        reasons = (f"{name} ({reason})" for name, reason in parts.left_whole.items())
        sentences.append(f"whole on every rank of the tensor axis: {'; '.join(reasons)}")
    context.log.write("layout", sentences=sentences)


def conclude(context: Context, loop: Loop, job: Job, reason: str, seconds: float) -> None:
    """Training has ended, after `seconds`.

    Raises:
        CheckpointError: see `require_saved`.
    """
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
    require_saved(loop)


def require_saved(loop: Loop) -> None:
    """Whatever was told: without a file of it, the training is lost.

    Raises:
        CheckpointError: the final state could not be saved.
    """
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


def named(error: BaseException, run: Run, node: str) -> BaseException:
    """Out of memory in the words of this machine and plan; any other error as it is."""
    words = str(error)
    if not is_out_of_memory(error):
        return error
    layout, here = load_plan(run.plan).layout, psutil.virtual_memory()
    hints = ["a smaller batch.size, or more batch.accumulate"]
    hints += ["layout.recompute = true"] if not layout.recompute and layout.ranks_per_replica > 1 else []
    hints.append(f"layout.shard = {2 * layout.shard} or more: a rank then holds half as much of the model")
    return MachineError(
        f"out of memory on node {node}: this rank held {_peak_memory_bytes() / 1e9:.1f} GB "
        f"at most, and {here.available / 1e9:.1f} of the machine's {here.total / 1e9:.1f} GB are free "
        f"({words.partition(chr(10))[0][:200]}). Try {'; '.join(hints)}"
    )


def report(error: BaseException, log: EventLog) -> None:
    """This rank failed."""
    text = "".join(traceback.format_exception(error))
    print(text, file=sys.stderr, flush=True)
    trace = "" if isinstance(error, ShoalError) else user_traceback(error)
    fields: dict[str, Any] = {"error": type(error).__name__, "message": str(error), "traceback": trace}
    fields["symptom"] = isinstance(error, PeerLostError | RunEnded)
    log.write("error", **fields)
