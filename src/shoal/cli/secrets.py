"""`shoal secrets`: make the keys with which parameter servers and workers know each other."""

from __future__ import annotations

from pathlib import Path

import click

from shoal.wire.secrets import create_secrets


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
def secrets(file: Path) -> None:
    """Write new keys to FILE, which only you may read, and which must not exist yet.

    Name it in the plan's [sync] secrets and copy it to every node: all that workers and parameter servers send each
    other is then encrypted, and whoever has not these keys is refused.
    """
    create_secrets(file)
    click.echo(str(file))
