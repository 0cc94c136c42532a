"""One rank of a stock PyTorch system: the loop of PyTorch's own tutorials, on a plan's data, batch and clipping.

DistributedDataParallel; FSDP2 over all ranks; or HSDP, which is FSDP2 inside nodes and all-reduce between them.

It writes the events that Shoal's ranks write (`shoal.events`), so that both are read alike. `bytes_sent` is payload, as
Shoal counts it: a ring all-reduce of the gradients. `interface_bytes` is what the network interface counted. On one
rank the model is trained as it is, without DistributedDataParallel around it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from shoal.data.loader import Batch, Cursor
from shoal.engine import build
from shoal.engine.forward import Forward
from shoal.engine.validation import Validator
from shoal.events import EventLog
from shoal.job.job import Job
from shoal.job.target import resolve
from shoal.plan import Plan, parse_plan
from shoal.strategy.layout.grid import arrange
from shoal.strategy.topology import Topology
from shoal.wire.groups import World
from shoal.wire.rendezvous import connect, identity_from, join, leave, start_default_group

CPU = torch.device("cpu")


def validator(job: Job, parts: build.Parts, plan: Plan, topology: Topology, world: World) -> Validator:
    """Shoal's own: the same windows, divided alike."""
    assert parts.validation is not None
    return Validator(
        dataset=parts.validation,
        forward=Forward(parts.model, job.loss, CPU, plan.compute.precision),
        metrics={},
        rank=topology.rank,
        world_size=topology.world_size,
        batch_size=-(-plan.batch.size // topology.world_size),
        limit=plan.validation.samples,
        collate=job.collate,
        sum=world.sum,
    )


def wrap(model: nn.Module, system: str, topology: Topology) -> nn.Module:
    """The model as a system wants it."""
    if topology.world_size == 1:
        return model
    if system == "ddp":
        return DistributedDataParallel(model)
    shape, names = ((topology.world_size,), ("shard",))
    if system == "hsdp":
        size = len(topology.local_ranks)
        shape, names = (topology.world_size // size, size), ("replicate", "shard")
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for block in model.blocks:  # type: ignore[union-attr]  # the example's
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def stepper(job: Job, parts: build.Parts, plan: Plan, topology: Topology, system: str) -> Callable[[Batch], float]:
    """A function that takes one step and returns this rank's loss."""
    wrapped = wrap(parts.model, system, topology)
    sharded = system in ("fsdp", "hsdp") and topology.world_size > 1
    optimizer, schedule = parts.optimizer, parts.schedule
    if sharded:
        optimizer = job.optimizer(list(wrapped.parameters()))
        schedule = job.schedule(optimizer) if job.schedule else None

    def step(batch: Batch) -> float:
        [(_, samples)] = batch.micro_batches
        optimizer.zero_grad()
        loss = job.loss(wrapped, samples)
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        if plan.compute.clip_norm is not None:
            nn.utils.clip_grad_norm_(parts.model.parameters(), plan.compute.clip_norm)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        return loss.item()  # as Shoal's loop does: a loss that nobody reads cannot be checked

    return step


def interface_bytes() -> int:
    """What this node's interface has sent so far."""
    return int(Path(f"/sys/class/net/{os.environ['GLOO_SOCKET_IFNAME']}/statistics/tx_bytes").read_text())


def train(job: Job, plan: Plan, topology: Topology, world: World, log: EventLog, system: str) -> None:
    """Train for the plan's number of steps, and validate when it says so."""
    parts = build.build_parts(job, plan, topology, arrange(plan.layout, topology.nodes), CPU, world)
    validate = validator(job, parts, plan, topology, world) if plan.validation.every else None
    take_step = stepper(job, parts, plan, topology, system)
    size = topology.world_size
    gradient_bytes = sum(p.numel() * p.element_size() for p in parts.model.parameters() if p.requires_grad)
    payload = 2 * gradient_bytes * (size - 1) // size
    batches = parts.loader.batches(Cursor())
    assert plan.stop.steps is not None
    for number in range(1, plan.stop.steps + 1):
        before, started = interface_bytes(), time.perf_counter()
        batch = next(batches)
        loss = take_step(batch)
        step_s = time.perf_counter() - started
        log.write(
            "step",
            step=number,
            loss=loss,
            samples=batch.size,
            share=batch.share,
            step_s=step_s,
            bytes_sent=payload,
            interface_bytes=interface_bytes() - before,
        )
        if validate is not None and (number % plan.validation.every == 0 or number == plan.stop.steps):
            values = validate()
            if topology.rank == 0:
                log.write("validation", step=number, loss=values["val_loss"])
    log.write("run_finished", reason="steps", bytes_sent=payload * plan.stop.steps)


def main() -> None:
    """Train one rank and end the process."""
    settings: dict[str, Any] = json.loads(sys.argv[1])
    plan = parse_plan(settings["plan"], origin="benchmark")
    identity = identity_from(os.environ)
    membership = join(identity, {})
    world = connect(membership, CPU)
    start_default_group(membership, CPU)
    topology = Topology(identity.rank, membership.nodes)
    build.set_threads(plan.compute, topology)
    job = resolve(settings["job"], settings["set"]).load()
    with EventLog(Path(settings["events"]) / f"rank-{identity.rank}.jsonl", f"rank-{identity.rank}") as log:
        train(job, plan, topology, world, log, settings.get("system", "ddp"))
    if identity.rank == 0:
        print("{}")
    sys.stdout.flush()
    leave(membership, world)
    os._exit(0)


if __name__ == "__main__":
    main()
