"""`shoal train`: train a job on local processes or in the lab, with a live display and a report at the end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from shoal.dashboard.progress import LiveProgress
from shoal.dashboard.report import print_report
from shoal.job.target import resolve
from shoal.run import Run
from shoal.training import Limits, Result, Where, execute


@click.command()
@click.argument("job")
@click.option("--nodes", type=int, help="Number of workers.")
@click.option("--plan", type=click.Path(path_type=Path), help="A plan file; default: all-reduce.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="A parameter of the job function.")
@click.option("--on", default="local", show_default=True, help="local, or lab: an emulated network on this machine.")
@click.option("--lab", help="The lab, e.g. nodes=4,link=100mbit,cpu=0.5, or a cluster.toml.")
@click.option("--run", "folder", type=click.Path(path_type=Path), help="Where the run goes; default: runs/JOB-TIME.")
@click.option("--resume", is_flag=True, help="Continue the run in --run from its newest whole checkpoint.")
@click.option("--steps", type=int, help="Stop after so many steps.")
@click.option("--epochs", type=int, help="Stop after so many epochs.")
@click.option("--seconds", type=float, help="Stop after so many seconds of training.")
@click.option("--until", metavar="CONDITION", help="Stop when validation reaches it, e.g. 'val_loss<=1.9'.")
@click.option("--port", type=int, default=0, help="Where rank 0 listens; default: a free port.")
@click.option("--address", help="This machine's address for workers of others, which `shoal join`; default: loopback.")
@click.option("--min-nodes", type=int, help="Go on as long as so many workers live, instead of ending with the first.")
@click.option("--max-nodes", type=int, help="Let workers join, up to so many.")
@click.option("--faults", type=click.Path(path_type=Path), help="Failures to rehearse, from a faults.toml.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line of stdout.")
def train(
    job: str,
    plan: Path | None,
    settings: tuple[str, ...],
    folder: Path | None,
    resume: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train JOB, named as path.py:function."""
    limits = Limits(**_given(options, "steps", "epochs", "seconds", "until"))  # type: ignore[typeddict-item]
    bounds = _given(options, "min_nodes", "max_nodes")
    console = Console(stderr=True)
    target = resolve(job, settings)
    where = Where(**_given(options, "nodes", "on", "lab", "port", "address", "faults"), bounds=bounds)
    with LiveProgress(console) as progress:
        result = execute(
            target,
            plan,
            where,
            folder,
            resume=resume,
            limits=limits,
            show=progress.update,
            notice=console.print,
        )
    _conclude(result, console, as_json=as_json)


def _given(options: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Those of the options that the command line names."""
    return {name: options[name] for name in names if options[name] is not None}


def _conclude(result: Result, console: Console, *, as_json: bool) -> None:
    print_report(Run(result.run), console if as_json else Console())
    if as_json:
        click.echo(json.dumps(result.summary))
