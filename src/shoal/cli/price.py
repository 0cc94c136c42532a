"""`shoal price`: what a plan sends over which link, and how long that takes, without a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from shoal.cluster.description import Cluster, Node, parse_lab
from shoal.errors import UsageError
from shoal.job.job import Job
from shoal.job.target import resolve
from shoal.plan import Plan, load_plan
from shoal.plan import price as pricing
from shoal.plan.price import LATENCY_S, Price, links_of, seats_of, shapes_of
from shoal.units import format_bytes, format_duration

_STEPS = 100


@click.command()
@click.argument("job")
@click.option(
    "--nodes", type=click.IntRange(min=1), help="Number of nodes with one rank each; default: the lab's, or 2."
)
@click.option("--plan", "plan_file", type=click.Path(path_type=Path), help="A plan file; default: all-reduce.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="A parameter of the job function.")
@click.option("--lab", help="The nodes and their links, e.g. nodes=4,ranks=2,link=100mbit, or a cluster.toml.")
@click.option("--steps", type=click.IntRange(min=1), help=f"Steps of the run; default: the plan's, or {_STEPS}.")
@click.option("--every", type=click.IntRange(min=1), help="What to reckon with where sync.every is auto.")
@click.option(
    "--latency", type=click.FloatRange(min=0), default=LATENCY_S * 1e3, show_default=True, help="Of a message, ms."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line of stdout.")
def price(
    job: str,
    nodes: int | None,
    plan_file: Path | None,
    settings: tuple[str, ...],
    lab: str | None,
    steps: int | None,
    every: int | None,
    latency: float,
    as_json: bool,
) -> None:
    """Say what JOB would send between ranks under a plan, without training it.

    Bytes and messages are exact, seconds an estimate.
    """
    plan = load_plan(plan_file) if plan_file else Plan()
    cluster = _cluster(nodes, lab)
    made = resolve(job, settings).load()
    found = pricing.price(
        plan,
        shapes_of(made.model()),
        seats_of(cluster),
        steps=steps or plan.stop.steps or _STEPS,
        links=links_of(cluster, latency_s=latency / 1e3),
        every=every,
        validates=plan.sync.kind == "gossip" and _validates(made),
    )
    _show(found, Console(stderr=as_json))
    if as_json:
        click.echo(json.dumps(_plain(found)))


def _cluster(nodes: int | None, lab: str | None) -> Cluster:
    if lab is None:
        return Cluster(nodes=tuple(Node(name=f"node{index}") for index in range(nodes or 2)))
    cluster = parse_lab(lab)
    if nodes is not None and nodes != len(cluster.nodes):
        raise UsageError(f"--nodes is {nodes}, but --lab describes {len(cluster.nodes)} nodes; leave --nodes away")
    return cluster


def _validates(job: Job) -> bool:
    data = job.data()
    return isinstance(data, tuple) and len(data) == 2


def _show(found: Price, console: Console) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("link", "nodes", "messages/step", "bytes/step", "bytes in all"):
        table.add_column(name, justify="left" if name in ("link", "nodes") else "right", no_wrap=True)
    for rank, traffic in enumerate(found.traffic):
        for to, (messages, size_bytes) in sorted(traffic.sent.items()):
            where = f"{found.nodes[rank]} → {found.nodes[to]}"
            each = (f"{messages / found.steps:.4g}", format_bytes(size_bytes / found.steps), format_bytes(size_bytes))
            table.add_row(f"{rank} → {to}", where, *each)
    if table.row_count:
        console.print(table)
    else:
        console.print("Nothing goes over the network.")
    if found.seconds is not None:
        console.print(
            f"{format_duration(found.seconds / found.steps)} of communication a step, {format_duration(found.seconds)} "
            f"in {found.steps} steps; beside nothing else, and with free computing"
        )


def _plain(found: Price) -> dict[str, Any]:
    return {
        "steps": found.steps,
        "nodes": list(found.nodes),
        "traffic": [traffic.to_plain() for traffic in found.traffic],
        "seconds": found.seconds,
        "exchanges": [
            {
                "name": part.name,
                "times": part.times,
                "seconds": part.seconds,
                "traffic": [once.to_plain() for once in part.traffic],
            }
            for part in found.parts
        ],
    }
