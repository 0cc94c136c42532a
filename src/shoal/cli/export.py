"""`shoal export`: a run's model as one plain file."""

from __future__ import annotations

import json
from pathlib import Path

import click

from shoal.engine.checkpoint.export import export_model
from shoal.run import Run
from shoal.units import format_bytes


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--to", "target", type=click.Path(path_type=Path), help="The file; default: RUN/model.safetensors.")
@click.option("--best", is_flag=True, help="The checkpoint of lowest validation loss; default: the newest.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line of stdout.")
def export(run: Path, target: Path | None, best: bool, as_json: bool) -> None:
    """Write the model of RUN as one file, whatever the layout it was trained under.

    A name that ends in .pt gives a state dict for torch.load; any other a safetensors file.
    """
    opened = Run(run)
    opened.read_info()
    exported = export_model(opened.checkpoints, target or run / "model.safetensors", best=best)
    if as_json:
        click.echo(json.dumps(exported.to_plain()))
    else:
        click.echo(
            f"{exported.path}: {exported.num_values:,} numbers in {exported.num_tensors} tensors, of step "
            f"{exported.step}, {format_bytes(exported.size_bytes)}"
        )
