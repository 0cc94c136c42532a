"""Puts a rank's parts, its connections and the run's files together into a training loop."""

from __future__ import annotations

from typing import Any

import torch

from shoal.engine.build import Connected, Parts
from shoal.engine.checkpoint.session import CheckpointSession
from shoal.engine.computation import Computation, Direct
from shoal.engine.exchange import ReplicaExchange
from shoal.engine.forward import Forward
from shoal.engine.layout.pipeline.forward import Pipelined, PipelinedForward
from shoal.engine.loop import Crew, Loop, LoopConfig
from shoal.engine.pace import InStep, OwnPace
from shoal.engine.progress import Progress
from shoal.engine.stopping import StopRule
from shoal.engine.turnover import Turnover
from shoal.engine.validation import Validator
from shoal.errors import JobError
from shoal.events import EventLog
from shoal.job.job import Job
from shoal.plan import Plan
from shoal.strategy.layout.grid import Grid


def assemble(
    job: Job,
    parts: Parts,
    connected: Connected,
    exchange: ReplicaExchange,
    checkpoints: CheckpointSession,
    progress: Progress,
    turnover: Turnover,
    log: EventLog,
    **entering: Any,
) -> Loop:
    """A loop that goes on from `progress`. `entering`: `newcomer` and `giving` of `Crew`."""
    plan, grid, rank = connected.plan, connected.grid, connected.topology.rank
    forward, computation = _computation(plan, job, parts, connected.device)
    crew = Crew(
        parts=parts,
        computation=computation,
        exchange=exchange,
        checkpoints=checkpoints,
        validator=_validator(job, parts, forward, connected),
        pace=_pace(parts, exchange, connected, progress),
        stop_rule=StopRule(plan.stop),
        turnover=turnover,
        world=connected.world,
        log=log,
        **entering,
    )
    return Loop(_config(plan, grid, rank), crew, progress)


def _computation(plan: Plan, job: Job, parts: Parts, device: torch.device) -> tuple[Forward, Computation]:
    forward = Forward(parts.model, job.loss, device, plan.compute.precision)
    if parts.pipeline is None:
        return forward, Direct(forward, parts.replica)
    line, traced = parts.pipeline
    pipelined = PipelinedForward(forward, line, traced)
    return pipelined, Pipelined(pipelined, line, parts.replica)


def _config(plan: Plan, grid: Grid, rank: int) -> LoopConfig:
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
        survives=plan.elastic.min_nodes > 0,
    )


def _pace(parts: Parts, exchange: ReplicaExchange, connected: Connected, progress: Progress) -> InStep | OwnPace:
    if not exchange.asynchronous:
        return InStep(parts.loader, progress)
    plan, world = connected.plan, connected.world
    store = world.store.clone()  # type: ignore[attr-defined]  # a client waits with its lock held
    periods = (plan.validation.every if parts.validation is not None else 0, plan.checkpoint.every)
    return OwnPace(store, world.sum, parts.loader, connected.topology.world_size, periods, plan.stop.steps)


def _validator(job: Job, parts: Parts, forward: Forward, connected: Connected) -> Validator | None:
    plan, grid = connected.plan, connected.grid
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
        rank=grid.feed(connected.topology.rank),
        world_size=grid.feeds,
        batch_size=-(-plan.batch.size // (grid.feeds * plan.batch.accumulate)),
        limit=plan.validation.samples,
        collate=job.collate,
        sum=connected.world.sum,
        shards=plan.layout.shard,
    )
