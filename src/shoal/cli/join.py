"""`shoal join`: start workers on this machine for an elastic run that goes on elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import click

from shoal.errors import WorkerFailedError
from shoal.launch.joining import Joining
from shoal.run import Run


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--workers", type=int, default=1, show_default=True, help="How many to start here.")
@click.option("--address", help="This machine's address for the other workers; default: the one that reaches the run.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line of stdout.")
def join(run: Path, workers: int, address: str | None, as_json: bool) -> None:
    """Train along in the run whose directory is RUN, which this machine must see as the others do.

    The run must be elastic (`shoal train --min-nodes`), and listen on an address that this machine reaches (`shoal
    train --address`). Ctrl-C hands over and leaves, and the others go on.
    """
    joining = Joining(Run(run), workers=workers, address=address, notice=lambda line: click.echo(line, err=True))
    guests = joining.follow()
    if as_json:
        told = [{"seat": guest.seat, "ended": guest.ended, "step": guest.step} for guest in guests]
        click.echo(json.dumps({"run": str(run), "node": joining.node, "workers": told}))
    failed = [f"seat {guest.seat}: {guest.message}" for guest in guests if guest.ended == "failed"]
    if failed:
        raise WorkerFailedError("\n".join(failed))
