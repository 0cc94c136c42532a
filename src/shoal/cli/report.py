"""`shoal report`: write the report of a run and print it in short."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console

from shoal.dashboard.history import summary
from shoal.dashboard.report import print_report, read_history, write_report
from shoal.run import Run


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line of stdout.")
def report(run: Path, as_json: bool) -> None:
    """Show what happened in RUN, the folder that `shoal train` named in its last line.

    Writes report.html and loss.png into it, whether it has finished, was killed or still runs.
    """
    opened = Run(run)
    write_report(opened)
    print_report(opened, Console(stderr=as_json))
    if as_json:
        click.echo(json.dumps(summary(read_history(opened), str(run))))
