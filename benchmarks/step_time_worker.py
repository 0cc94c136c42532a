"""One rank of step_time.py: the same model trained by Shoal, by DistributedDataParallel and alone, in turn."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from shoal.data.loader import Batch, Cursor
from shoal.engine import build
from shoal.engine.assemble import assemble
from shoal.engine.checkpoint.archive import Archive
from shoal.engine.checkpoint.session import CheckpointSession
from shoal.engine.control import StopRequest
from shoal.engine.progress import Progress
from shoal.engine.turnover import Turnover
from shoal.events import EventLog
from shoal.job.target import resolve
from shoal.plan import Plan, parse_plan, resolve_plan
from shoal.strategy.layout.grid import arrange
from shoal.strategy.topology import Topology
from shoal.wire.groups import World
from shoal.wire.rendezvous import connect, identity_from, join, leave, start_default_group

CPU = torch.device("cpu")
Step = Callable[[], object]


def shoal_step(target: str, settings: list[str], plan: Plan, topology: Topology, world: World) -> Step:
    """Shoal's own loop, event log included."""
    job = resolve(target, settings).load()
    parts = build.build_parts(job, plan, topology, arrange(plan.layout, topology.nodes), CPU, world)
    folder = Path(tempfile.mkdtemp(prefix="shoal-benchmark-"))
    log = EventLog(folder / "events.jsonl", f"rank-{topology.rank}")
    connected = build.connect_lanes(plan, topology, world, CPU)
    exchange = build.build_exchange(parts, connected, log)
    checkpoints = CheckpointSession(world, Archive(folder, keep=1, keep_best=False), log, CPU)
    turnover = Turnover(StopRequest())
    loop = assemble(job, parts, connected, exchange, checkpoints, Progress(), turnover, log)
    return lambda: loop.take_steps(loop.progress.step + 1)


def plain_step(target: str, settings: list[str], plan: Plan, topology: Topology, *, wrap: bool) -> Step:
    """The loop of PyTorch's own tutorial, over DistributedDataParallel as it comes, or over the bare model."""
    job = resolve(target, settings).load()
    parts = build.build_parts(job, plan, topology, arrange(plan.layout, topology.nodes), CPU)
    batches: Iterator[Batch] = parts.loader.batches(Cursor())
    model = DistributedDataParallel(parts.model) if wrap else parts.model

    def step() -> None:
        [(_, samples)] = next(batches).micro_batches
        parts.optimizer.zero_grad()
        loss = job.loss(model, samples)
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        parts.optimizer.step()
        loss.item()  # as Shoal's loop does: a loss that nobody reads cannot be checked

    return step


def sent_bytes() -> int:
    """What this host's interface has sent so far."""
    return int(Path(f"/sys/class/net/{os.environ['GLOO_SOCKET_IFNAME']}/statistics/tx_bytes").read_text())


def measure(step: Step, num_steps: int) -> tuple[float, float]:
    """Median seconds a step, and bytes sent a step, over one block that all ranks begin together."""
    dist.barrier()
    before, times = sent_bytes(), []
    for _ in range(num_steps):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    dist.barrier()
    return statistics.median(times), (sent_bytes() - before) / num_steps


def main() -> None:
    """Run blocks of every system in turn and print rank 0's figures."""
    settings: dict[str, Any] = json.loads(sys.argv[1])
    identity = identity_from(os.environ)
    membership = join(identity, {})
    world = connect(membership, CPU)
    start_default_group(membership, CPU)
    topology = Topology(identity.rank, membership.nodes)
    plan = parse_plan(settings["plan"], origin="benchmark")
    plan = dataclasses.replace(
        plan, batch=dataclasses.replace(plan.batch, size=topology.world_size * settings["share"])
    )
    target, arguments = settings["job"], settings["set"]
    steps: dict[str, Step] = {}
    for name in settings["systems"]:
        if name.startswith("shoal"):
            codec = name.partition("-")[2] or "none"
            coded = resolve_plan(parse_plan(f'codec.kind = "{codec}"', origin="benchmark"), topology.world_size)
            this = dataclasses.replace(resolve_plan(plan, topology.world_size), codec=coded.codec)
            steps[name] = shoal_step(target, arguments, this, topology, world)
        else:
            this = resolve_plan(plan, topology.world_size)
            steps[name] = plain_step(target, arguments, this, topology, wrap=name == "ddp")
    for step in steps.values():
        measure(step, 2)
    rounds = []
    for index in range(settings["rounds"]):
        names = list(steps)
        rotated = names[index % len(names) :] + names[: index % len(names)]
        rounds.append({name: measure(steps[name], settings["steps"]) for name in rotated})
    if identity.rank == 0:
        print(json.dumps(rounds))
    sys.stdout.flush()
    leave(membership, world)
    os._exit(0)


if __name__ == "__main__":
    main()
