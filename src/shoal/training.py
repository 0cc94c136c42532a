"""`shoal.train`: from a job, a plan and some nodes to a finished run."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, Unpack

from shoal.cluster.description import Cluster, load_cluster, parse_lab
from shoal.cluster.faults import Fault, load_faults, require_without_lab, schedule
from shoal.dashboard.folding import fold
from shoal.dashboard.history import History, summary
from shoal.dashboard.progress import LiveProgress
from shoal.dashboard.report import read_history, write_report
from shoal.errors import FaultsError, UsageError
from shoal.events import read_events
from shoal.job.job import Job
from shoal.job.target import Target, resolve, target_of
from shoal.launch import local
from shoal.launch.audience import Audience
from shoal.launch.elastic import ElasticSupervisor, Membership
from shoal.launch.lab.lab import Lab
from shoal.launch.placement import Seating
from shoal.launch.supervisor import Supervisor
from shoal.plan import (
    Plan,
    check_resumable,
    dump_plan,
    load_plan,
    num_ranks,
    num_servers,
    plan_hash,
    resolve_plan,
    with_flags,
)
from shoal.run import Run, open_run, write_atomic
from shoal.wire.addresses import is_loopback, on_network_of
from shoal.wire.tls import tls_of


class Limits(TypedDict, total=False):
    """When to stop, over what the plan says: see `plan.schema.StopConfig`."""

    steps: int
    epochs: int
    seconds: float
    until: str


@dataclass(frozen=True, kw_only=True)
class Where:
    """On what to train.

    Attributes:
        nodes: the number of workers; default: the lab's, those of the run that is resumed, or 1.
        on: "local" (processes on this machine) or "lab" (an emulated network on this machine).
        lab: the lab's description, e.g. "nodes=4,link=100mbit,cpu=0.5", or a cluster.toml.
        port: where rank 0 listens, on local; 0 takes a free one.
        address: this machine's IPv4 address at which the run's processes listen, on local; None is loopback.
        faults: a file of failures to rehearse.
        bounds: `min_nodes` and `max_nodes` of `[elastic]`, over what the plan says.
    """

    nodes: int | None = None
    on: str = "local"
    lab: str | None = None
    port: int = 0
    address: str | None = None
    faults: Path | None = None
    bounds: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """A finished run: its directory, and the figures that `shoal train --json` prints."""

    run: Path
    summary: Mapping[str, Any]


def train(
    job: str | Target | Callable[..., Job],
    *,
    plan: Plan | Path | str | None = None,
    nodes: int | None = None,
    on: str = "local",
    lab: str | None = None,
    run: Path | str | None = None,
    resume: bool = False,
    progress: bool = True,
    **limits: Unpack[Limits],
) -> Result:
    """Train `job` and return when it has ended.

    Args:
        job: `path.py:function`, or a function at the top level of a file, that returns a Job.
        plan: a Plan or a plan file; default: all-reduce over all ranks.
        nodes, on, lab: see `Where`.
        run: the run directory; default: a new one under `runs/`.
        resume: continue the run there from its newest whole checkpoint.
        progress: show the training live on stderr.
        limits: steps, epochs, seconds, until; they go before the plan's.

    Raises:
        UsageError: something given does not fit.
        WorkerFailedError: a worker failed; the message tells which and why.
    """
    target = job if isinstance(job, Target) else resolve(job) if isinstance(job, str) else target_of(job, {})
    where = Where(nodes=nodes, on=on, lab=lab)
    folder = Path(run) if run is not None else None
    if not progress:
        return execute(target, plan, where, folder, resume=resume, limits=limits)
    with LiveProgress() as display:
        return execute(target, plan, where, folder, resume=resume, limits=limits, show=display.update)


def execute(
    target: Target,
    plan: Plan | Path | str | None,
    where: Where,
    folder: Path | None,
    *,
    resume: bool,
    limits: Limits,
    show: Callable[[History], None] = lambda _: None,
    notice: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
) -> Result:
    """What `train` and the command line share. `show` is given the growing history a few times a second."""
    cluster = _cluster(where)
    wanted = load_plan(Path(plan)) if isinstance(plan, str | Path) else plan
    run = open_run(folder, target.short_name, resume=resume) if resume else None
    before = num_ranks(load_plan(run.plan)) if run else None
    world_size = where.nodes or (cluster.world_size if cluster else before or 1)
    flags = {"stop": limits, "elastic": where.bounds}
    resolved = _resume_plan(run, target, wanted, flags, world_size) if run else _fresh_plan(wanted, flags, world_size)
    _check_nodes(where, cluster, resolved)
    membership = _membership(resolved, world_size) if resolved.elastic.min_nodes else None
    faults = _faults(where, resolved, world_size)
    run = run or open_run(folder, target.short_name, resume=False)
    with run.claimed():
        _store(run, target, resolved)
        audience = _audience(run, resume=resume, show=show, notice=notice)
        with _seating(where, cluster, num_ranks(resolved)) as (seating, lab):
            if membership is None:
                Supervisor(seating, run, audience, resume=resume, num_servers=num_servers(resolved)).run()
            else:
                _warn_of_open_token(where, membership, notice)
                ElasticSupervisor(
                    seating, run, membership, audience, resume=resume, faults=faults, lab=lab
                ).run_to_the_end()
    write_report(run)
    return Result(run.path, summary(read_history(run), str(run.path)))


def _audience(run: Run, *, resume: bool, show: Callable[[History], None], notice: Callable[[str], None]) -> Audience:
    """`show` sees the whole history, a resumed run's past included."""
    history = History()
    if resume:
        fold(read_events(run.events), history)
    return Audience(watch=lambda events: show(fold(events, history)), notice=notice)


def _warn_of_open_token(where: Where, membership: Membership, notice: Callable[[str], None]) -> None:
    if where.address and not is_loopback(where.address) and membership.tls is None:
        notice(
            f"warning: who listens on the network of {where.address} can read the token that lets workers join; "
            "elastic.tls_certificate and tls_key encrypt it"
        )


def _cluster(where: Where) -> Cluster | None:
    if where.on not in ("local", "lab"):
        raise UsageError(f"--on got {where.on!r}, expected local or lab")
    if where.nodes is not None and where.nodes < 1:
        raise UsageError(f"--nodes got {where.nodes}, expected at least 1")
    if where.address is not None:
        if where.on == "lab":
            raise UsageError("--address is for runs on real machines; the lab's nodes have addresses of their own")
        on_network_of(where.address)
    if where.on == "local":
        if where.lab is not None:
            raise UsageError("--lab describes an emulated cluster, but --on is local; add --on lab")
        return None
    described = where.lab or f"nodes={where.nodes or 4}"
    return load_cluster(Path(described)) if described.endswith(".toml") else parse_lab(described)


def _check_nodes(where: Where, cluster: Cluster | None, plan: Plan) -> None:
    """Nodes of a lab may be left over for those who join later, if anybody can join."""
    if cluster is not None and plan.elastic.tls_certificate is not None:
        raise UsageError(
            "elastic.tls_certificate is for runs on real machines, and the lab's network is this machine's own; leave "
            "it out"
        )
    if cluster is None or where.nodes is None or where.nodes == len(cluster.nodes):
        return
    if where.nodes > len(cluster.nodes) or not plan.elastic.min_nodes:
        raise UsageError(
            f"--nodes is {where.nodes}, but --lab describes {len(cluster.nodes)} nodes; leave --nodes away"
        )
    if any(node.ranks > 1 for node in cluster.nodes):
        raise UsageError("--nodes leaves nodes of --lab over for later, which needs one rank a node; set ranks=1")


def _faults(where: Where, plan: Plan, world_size: int) -> list[Fault]:
    """What to rehearse.

    Raises:
        FaultsError: the file is wrong, or the plan lets no worker be lost.
    """
    if where.faults is None:
        return []
    if not plan.elastic.min_nodes:
        raise FaultsError(
            "--faults rehearses failures, but under this plan the first one ends the run; set elastic.min_nodes to the "
            "least number of workers to go on with"
        )
    faults = schedule(load_faults(where.faults), world_size)
    if where.on != "lab":
        for fault in faults:
            require_without_lab(fault)
    if any(fault.kind == "flip_message" for fault in faults) and not getattr(plan.sync, "verify", False):
        raise FaultsError(
            "flip_message changes a byte on the wire, and under this plan nobody would notice: set sync.verify = true"
        )
    return faults


def _membership(plan: Plan, world_size: int) -> Membership:
    elastic = plan.elastic
    most = elastic.max_nodes or max(plan.batch.size, world_size)
    if not elastic.min_nodes <= world_size <= most:
        raise UsageError(
            f"elastic.min_nodes is {elastic.min_nodes} and max_nodes {most}, but --nodes is {world_size}; "
            "start a number of workers between them"
        )
    return Membership(
        nodes=world_size,
        min_nodes=elastic.min_nodes,
        max_nodes=most,
        lease_s=elastic.lease_s,
        restarts=elastic.restarts,
        servers=num_servers(plan),
        tls=tls_of(elastic.tls_certificate, elastic.tls_key, elastic.tls_authority),
    )


Flags = Mapping[str, Mapping[str, Any]]
"""Table of the plan -> key -> value, from the command line."""


def _fresh_plan(plan: Plan | None, flags: Flags, world_size: int) -> Plan:
    return resolve_plan(with_flags(plan or Plan(), _named(flags)), world_size)


def _resume_plan(run: Run, target: Target, plan: Plan | None, flags: Flags, world_size: int) -> Plan:
    """The run's own plan; only when to stop, and who may come and go, may be new.

    A limit that is given replaces all of the old ones.
    """
    before = load_plan(run.plan)
    info = run.read_info()
    if (info.get("job"), info.get("arguments")) != (target.name, dict(target.arguments)):
        raise UsageError(
            f"cannot resume: {run.path} trained {info.get('job')} with {info.get('arguments')}, not {target.name} with "
            f"{dict(target.arguments)}"
        )
    now = before
    if plan is not None:
        now = resolve_plan(plan, world_size)
        check_resumable(before, now)
    if flags["stop"]:
        cleared = dataclasses.replace(now.stop, steps=None, epochs=None, seconds=None, until=None)
        now = dataclasses.replace(now, stop=cleared)
    return resolve_plan(with_flags(now, _named(flags)), world_size)


def _named(flags: Flags) -> dict[str, Mapping[str, Any]]:
    return {table: values for table, values in flags.items() if values}


def _store(run: Run, target: Target, plan: Plan) -> None:
    write_atomic(run.plan, dump_plan(plan).encode())
    info = {"job": target.name, "arguments": dict(target.arguments), "plan_hash": plan_hash(plan)}
    run.write_info(info | {"id": secrets.token_hex(8)})  # of this attempt: who attends to another's is refused


@contextlib.contextmanager
def _seating(where: Where, cluster: Cluster | None, world_size: int) -> Iterator[tuple[Seating, Lab | None]]:
    if cluster is None:
        here = {"address": where.address, "node": os.uname().nodename} if where.address else {}
        yield local.seating(world_size, where.port, **here), None
        return
    with Lab(cluster) as lab:
        yield lab.seating(), lab
