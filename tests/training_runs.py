"""Runs for tests: real worker processes on this machine, seated on as many make-believe nodes as a test wants."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from shoal.engine.checkpoint import archive, tree
from shoal.events import Event, read_events
from shoal.job.target import resolve
from shoal.launch.audience import Audience
from shoal.launch.placement import Placement, Seating
from shoal.launch.supervisor import Supervisor
from shoal.plan import dump_plan, num_servers, parse_plan, plan_hash, resolve_plan
from shoal.run import Run, open_run, write_atomic


def seat(nodes: Sequence[str]) -> Seating:
    """One rank for each name: ranks of one name share memory, others talk over the loopback network."""
    placements = tuple(
        Placement(rank=rank, node=node, local_rank=nodes[:rank].count(node), env={"GLOO_SOCKET_IFNAME": "lo"})
        for rank, node in enumerate(nodes)
    )
    return Seating(placements=placements, address="127.0.0.1", port=0)


def train_on(
    nodes: Sequence[str], job: str, plan: str, folder: Path, *, settings: Sequence[str] = (), resume: bool = False
) -> Run:
    """Train `job` under the TOML text `plan` as `shoal train` does, on the given nodes; return the finished run."""
    target = resolve(job, settings)
    resolved = resolve_plan(parse_plan(plan, origin="the test's plan"), len(nodes))
    run = open_run(folder, target.short_name, resume=resume)
    write_atomic(run.plan, dump_plan(resolved).encode())
    run.write_info({"job": target.name, "arguments": dict(target.arguments), "plan_hash": plan_hash(resolved)})
    Supervisor(seat(nodes), run, Audience(), resume=resume, num_servers=num_servers(resolved)).run()
    return run


def final_state(run: Run) -> dict[str, Any]:
    """The state in the newest checkpoint: model, optimizer, schedule, progress."""
    document, tensors = archive.read(newest_checkpoint(run))
    state: dict[str, Any] = tree.decode(document["state"], tensors)
    return state


def final_tensors(run: Run) -> dict[str, Tensor]:
    """Every tensor of the newest checkpoint, by its stored name."""
    return archive.read(newest_checkpoint(run))[1]


def newest_checkpoint(run: Run) -> Path:
    """The folder of the newest checkpoint."""
    return sorted(run.checkpoints.glob("step-*"))[-1]


def events_of(run: Run, kind: str, source: str = "rank-0") -> list[Event]:
    """All events of one kind from one process, in order."""
    return [event for event in read_events(run.events) if event["kind"] == kind and event["source"] == source]
