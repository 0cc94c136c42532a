"""Whatever the layout, what is exported loads into the plain model and computes what the run's model computed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from test_layouts import BLOCKS, plan_text

from shoal.cli.export import export
from shoal.engine.checkpoint.export import export_model
from shoal.errors import CheckpointError, RunError
from shoal.job.target import resolve
from training_runs import train_on


@pytest.mark.parametrize("layout", ["replicate = 2", "tensor = 2", "pipeline = 2"])
@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_an_exported_model_loads_into_the_plain_one(layout: str, name: str, tmp_path: Path) -> None:
    run = train_on(["a", "a"], BLOCKS, plan_text(layout), tmp_path / "run")
    exported = export_model(run.checkpoints, tmp_path / "out" / name, best=False)
    path = Path(exported.path)
    state = torch.load(path, weights_only=True) if name.endswith(".pt") else safetensors.torch.load_file(path)
    model = resolve(BLOCKS, []).load().model()
    model.load_state_dict(state)  # strict: nothing is missing, nothing too much
    assert exported.step == 10
    assert not list(path.parent.glob(".*"))


def test_the_command_names_what_it_wrote(tmp_path: Path) -> None:
    train_on(["a"], BLOCKS, plan_text("replicate = 1"), tmp_path / "run")
    ended = CliRunner().invoke(export, [str(tmp_path / "run"), "--json"])
    told = json.loads(ended.output.splitlines()[-1])
    assert told["path"] == str(tmp_path / "run" / "model.safetensors")
    assert told["num_values"] == sum(t.numel() for t in safetensors.torch.load_file(told["path"]).values())


def test_nothing_to_export_and_nowhere_to_write_are_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="has no checkpoint to export"):
        export_model(tmp_path, tmp_path / "model.pt", best=False)
    run = train_on(["a"], BLOCKS, plan_text("replicate = 1"), tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not write"):
        export_model(run.checkpoints, tmp_path / "file" / "model.pt", best=False)
