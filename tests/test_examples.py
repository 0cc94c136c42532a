"""Every example runs by the command that its page names, and its plan is valid."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shoal.plan import load_plan

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "charlm.py": ["--nodes", "2", "--plan", "plans/demo.toml", "--set", "layers=1", "--set", "dim=32", "--steps", "3"],
    "digits.py": ["--nodes", "4", "--plan", "plans/digits.toml", "--epochs", "3"],
    "tabular.py": ["--nodes", "2", "--plan", "plans/tabular.toml"],
}


def shoal(*arguments: str) -> dict[str, Any]:
    """Run the command line as a person does; return its JSON."""
    command = [sys.executable, "-m", "shoal.cli.main", *arguments, "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    summary: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return summary


@pytest.mark.parametrize("example", COMMANDS)
def test_an_example_trains_and_its_loss_falls(example: str, tmp_path: Path) -> None:
    summary = shoal("train", f"examples/{example}:job", *COMMANDS[example], "--run", str(tmp_path / "run"))
    log = (tmp_path / "run" / "events" / "rank-0.jsonl").read_text().splitlines()
    losses = [event["loss"] for event in map(json.loads, log) if event["kind"] == "step"]
    assert losses[-1] < losses[0]
    assert summary["steps"] == len(losses)
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_early_stopping_ends_the_tabular_example(tmp_path: Path) -> None:
    summary = shoal("train", "examples/tabular.py:job", *COMMANDS["tabular.py"], "--run", str(tmp_path / "run"))
    assert summary["reason"] == "patience"
    assert summary["metrics"]["accuracy"] > 0.9


def test_no_example_is_forgotten() -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(COMMANDS)


@pytest.mark.parametrize("path", sorted((ROOT / "plans").glob("*.toml")), ids=lambda path: path.name)
def test_a_shipped_plan_is_valid(path: Path) -> None:
    load_plan(path)
