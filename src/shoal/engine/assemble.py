"""Puts a rank's parts, its connections and the run's files together into a training loop."""

from __future__ import annotations

import functools
from typing import Any

import torch

from shoal.data.balance import BalanceConfig
from shoal.engine.build import Connected, Parts
from shoal.engine.checkpoint.cadence import Cadence
from shoal.engine.checkpoint.session import CheckpointSession
from shoal.engine.computation import Computation, Direct, Droppable, Forgiving
from shoal.engine.crew import Crew, LoopConfig
from shoal.engine.division import Division
from shoal.engine.exchange import ReplicaExchange
from shoal.engine.experience import Experience
from shoal.engine.forward import Forward
from shoal.engine.layout.pipeline.forward import Pipelined, PipelinedForward
from shoal.engine.lookout import Lookout, LookoutConfig
from shoal.engine.loop import Loop
from shoal.engine.own_pace import OwnPace, PaceConfig, Round
from shoal.engine.pace import InStep
from shoal.engine.progress import Progress
from shoal.engine.stopping import StopRule
from shoal.engine.stopwatch import Stopwatch
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
    *,
    division: Division | None = None,
    midway: Round | None = None,
    **entering: Any,
) -> Loop:
    """A loop that goes on from `progress`.

    Args:
        division: how batches are divided; default: as the plan says, without anything known.
        midway: of ranks at their own pace, a round that another view did not end.
        entering: `newcomer`, `giving`, `cadence` and `patience` of `Crew`.
    """
    plan, grid, rank = connected.plan, connected.grid, connected.topology.rank
    forward, computation = _computation(plan, job, parts, connected.device, log)
    division = division or divide_as_planned(plan)
    crew = Crew(
        parts=parts,
        computation=computation,
        stopwatch=Stopwatch(connected.device),
        exchange=exchange,
        checkpoints=checkpoints,
        validator=_validator(job, parts, forward, connected),
        pace=_pace(parts, exchange, connected, division, progress, turnover, midway),
        division=division,
        stop_rule=StopRule(plan.stop),
        turnover=turnover,
        world=connected.world,
        log=log,
        lookout=_lookout(connected, turnover, log),
        **entering,
    )
    return Loop(_config(plan, grid, rank, division), crew, progress)


def divide_as_planned(plan: Plan, **known: Any) -> Division:
    """The division of a plan for so many ranks. `known`: `cold`, `seats` and `known` of `Division`."""
    assert plan.batch.shares is not None
    balance = BalanceConfig() if plan.batch.balance else None
    return Division(plan.batch.shares, plan.batch.size, balance=balance, **known)


def keep_cadence(connected: Connected, progress: Progress, log: EventLog, known: Experience) -> Cadence | None:
    """When checkpoints are due, where the plan leaves that to measurements."""
    if connected.plan.checkpoint.every != "auto":
        return None
    tell = functools.partial(log.write, "interval") if connected.topology.rank == 0 else None
    cadence = Cadence(len(set(connected.topology.nodes)), progress.step, tell=tell)
    if known.cadence is not None:
        cadence.load_state_dict(dict(known.cadence))
    return cadence


def _lookout(connected: Connected, turnover: Turnover, log: EventLog) -> Lookout | None:
    plan, topology = connected.plan, connected.topology
    if plan.sync.kind != "allreduce" or plan.layout.ranks_per_replica > 1:
        return None
    config = LookoutConfig(
        rank=topology.rank,
        nodes=topology.nodes,
        leave_out_slower_than=plan.elastic.leave_out_slower_than,
        min_ranks=plan.elastic.min_nodes,
    )
    return Lookout(config, log, turnover.leave)


def _computation(
    plan: Plan, job: Job, parts: Parts, device: torch.device, log: EventLog
) -> tuple[Forward, Computation]:
    forward = Forward(parts.model, job.loss, device, plan.compute.precision)
    if parts.pipeline is None:
        direct = Direct(forward, parts.replica)
        if plan.batch.balance:
            return forward, Forgiving(direct, parts.replica, log)
        return forward, Droppable(direct, parts.replica) if getattr(plan.sync, "backup", 0) else direct
    line, traced = parts.pipeline
    pipelined = PipelinedForward(forward, line, traced)
    return pipelined, Pipelined(pipelined, line, parts.replica)


def _config(plan: Plan, grid: Grid, rank: int, division: Division) -> LoopConfig:
    every = plan.checkpoint.every
    return LoopConfig(
        rank=rank,
        weight=division.shares[grid.feed(rank)] / sum(division.shares) / plan.layout.tensor,
        clip_norm=plan.compute.clip_norm,
        validate_every=plan.validation.every,
        checkpoint_every=0 if every == "auto" else every,
        keep_best=plan.checkpoint.best,
        layout=grid.by_axis,
        writes_pieces=grid.index(rank, "replicate") == 0,
        survives=plan.elastic.min_nodes > 0 or plan.batch.balance,
    )


def _pace(
    parts: Parts,
    exchange: ReplicaExchange,
    connected: Connected,
    division: Division,
    progress: Progress,
    turnover: Turnover,
    midway: Round | None,
) -> InStep | OwnPace:
    if not exchange.asynchronous:
        return InStep(parts.loader.divided(division.shares), progress)
    plan = connected.plan
    assert plan.checkpoint.every != "auto", "ranks at their own pace meet at steps that are known beforehand"
    periods = (plan.validation.every if parts.validation is not None else 0, plan.checkpoint.every)
    config = PaceConfig(periods=periods, last_step=plan.stop.steps)
    keeper: Any = exchange if plan.elastic.min_nodes else None  # each of `exchange.Keeper`
    return OwnPace(config, connected.world, parts.loader, turnover, keeper=keeper, midway=midway)


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
