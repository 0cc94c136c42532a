"""The README and the docs say what is true: their map, their lines of code, their links and their plan."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.plan import dump_plan, parse_plan, resolve_plan

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_file_map_and_the_tree_agree() -> None:
    table = README.split("## Where things are")[1]
    named = {name.rstrip("/") for name in re.findall(r"`([\w/.]+)`", table)}
    named = {f"src/shoal/{name}" if name.endswith(".py") and "/" not in name else name for name in named}
    ignored = {"__init__.py", "_version.py", "__pycache__", "py.typed"}
    there = {f"src/shoal/{path.name}" for path in (ROOT / "src" / "shoal").iterdir() if path.name not in ignored}
    assert there <= named, "the map leaves something out"
    named -= {"shoal.train"}
    assert all((ROOT / name).exists() for name in named), "the map is stale"


def test_the_ten_lines_run(tmp_path: Path) -> None:
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert code is not None
    (tmp_path / "sine.py").write_text(code[1])
    done = subprocess.run(
        [sys.executable, "sine.py"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.01


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_links_only_to_what_exists(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", page.read_text()):
        assert link.startswith("https://") or (page.parent / link).exists(), link


def test_the_documented_plan_is_whole_and_valid() -> None:
    text = re.search(r"```toml\n(.*?)```", (ROOT / "docs" / "plan.md").read_text(), re.DOTALL)
    assert text is not None
    documented = parse_plan(text[1], origin="docs/plan.md")
    resolved = dump_plan(resolve_plan(documented, 4))
    keys = re.findall(r"^(\w+) =", resolved, re.MULTILINE)
    assert set(keys) == set(re.findall(r"^(\w+) +=", text[1], re.MULTILINE))
