"""Running out of memory is told with the node, what the rank held, and what to try."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.engine.telling import named
from shoal.errors import MachineError
from shoal.plan import Plan, dump_plan, parse_plan, resolve_plan
from shoal.run import open_run, write_atomic


@pytest.mark.parametrize(
    ("layout", "tries"),
    [
        ("", "layout.shard = 2 or more"),
        ("[layout]\nshard = 2", "layout.recompute = true; layout.shard = 4 or more"),
        ("[layout]\nshard = 2\nrecompute = true", "accumulate; layout.shard = 4 or more"),
    ],
)
def test_out_of_memory_is_named(layout: str, tries: str, tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", "job", resume=False)
    write_atomic(run.plan, dump_plan(resolve_plan(parse_plan(layout, origin="test"), 2)).encode())
    told = named(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), run, "n7")
    assert isinstance(told, MachineError)
    assert "out of memory on node n7: this rank held" in str(told)
    assert tries in str(told)


def test_any_other_error_stays_what_it_is(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", "job", resume=False)
    write_atomic(run.plan, dump_plan(resolve_plan(Plan(), 2)).encode())
    error = ValueError("something else")
    assert named(error, run, "n0") is error
