"""Every plan that we ship can be read, and completed for the ranks that it is meant for."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.plan import dump_plan, load_plan, parse_plan, resolve_plan

PLANS = sorted((Path(__file__).parents[2] / "plans").glob("*.toml"))


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_a_shipped_plan_is_whole(path: Path) -> None:
    resolved = resolve_plan(load_plan(path), 4)
    assert parse_plan(dump_plan(resolved), origin="again") == resolved
    assert path.read_text().startswith("# ")  # what it is for


def test_there_is_one_for_every_sync_and_every_axis() -> None:
    plans = [resolve_plan(load_plan(path), 4) for path in PLANS]
    assert {plan.sync.kind for plan in plans} == {"allreduce", "local", "gossip", "parameter_server"}
    assert {plan.sync.mode for plan in plans if plan.sync.kind == "parameter_server"} >= {"async", "ssp"}
    for axis in ("replicate", "shard", "tensor", "pipeline"):
        assert any(getattr(plan.layout, axis) > 1 for plan in plans), axis
