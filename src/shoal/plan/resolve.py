"""Plans from files and flags, completed and checked for a number of ranks.

Precedence: default < plan < flag. What comes out leaves nothing open and is what a run stores; `plan_hash` names it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoal import strict_toml
from shoal.errors import PlanError
from shoal.plan import capability
from shoal.plan.schema import Plan, StopConfig
from shoal.plan.until import Until
from shoal.strategy.layout.config import LayoutConfig
from shoal.strategy.layout.grid import AXES, nearest_products, sharded_over
from shoal.strategy.sync.parameter_server import ParameterServerConfig


def load_plan(path: Path) -> Plan:
    """Read a plan file.

    Raises:
        PlanError: with the line, what was got, what was expected and the nearest valid name.
    """
    return parse_plan(strict_toml.read(path, error=PlanError), origin=str(path))


def parse_plan(text: str, *, origin: str) -> Plan:
    """Read a plan from TOML text; `origin` names it in messages."""
    values = strict_toml.parse(text, origin=origin, error=PlanError)
    for table, kind in (("sync", "allreduce"), ("codec", "none")):
        if isinstance(values.get(table), dict):
            values[table].setdefault("kind", kind)
    return strict_toml.build(Plan, values, text=text, origin=origin, error=PlanError)


def with_flags(plan: Plan, flags: Mapping[str, Mapping[str, Any]]) -> Plan:
    """Put flags over a plan: table -> key -> value. A limit given by flag replaces the plan's."""
    changed = plan
    for table, values in flags.items():
        merged = dataclasses.asdict(getattr(changed, table)) | dict(values)
        kept = {key: value for key, value in merged.items() if value is not None}
        built = strict_toml.build(Plan, {table: kept}, text="", origin="command line", error=PlanError)
        changed = dataclasses.replace(changed, **{table: getattr(built, table)})
    return changed


def resolve_plan(plan: Plan, world_size: int) -> Plan:
    """Complete a plan for `world_size` ranks and check that its parts fit each other.

    Raises:
        PlanError: they do not; the message names both and says what to do.
    """
    layout = _complete_layout(plan.layout, world_size)
    shares = plan.batch.shares or (1.0,) * ((layout.replicate or 1) * layout.shard)
    stop = plan.stop if _is_bounded(plan.stop) else dataclasses.replace(plan.stop, epochs=1)
    resolved = dataclasses.replace(
        plan,
        layout=layout,
        batch=dataclasses.replace(plan.batch, shares=tuple(float(share) for share in shares)),
        stop=stop,
    )
    for check in (_check_layout, _check_batch, _check_stop, capability.check):
        check(resolved, world_size)
    return resolved


def dump_plan(plan: Plan) -> str:
    """A plan as TOML; `parse_plan` gives it back unchanged."""
    return strict_toml.dump(plan)


def plan_hash(plan: Plan) -> str:
    """Twelve hexadecimal digits that name a resolved plan."""
    return hashlib.sha256(dump_plan(plan).encode()).hexdigest()[:12]


def num_ranks(plan: Plan) -> int:
    """How many ranks a resolved plan lies over."""
    return math.prod(getattr(plan.layout, axis) or 1 for axis in AXES)


def for_ranks(plan: Plan, world_size: int) -> Plan:
    """A resolved plan for another number of ranks, with equal shares, sharded over no fewer if possible.

    Raises:
        PlanError: it does not fit so many.
    """
    _, shard = sharded_over(world_size, plan.layout.shard)
    layout = dataclasses.replace(plan.layout, replicate=None, shard=shard)
    batch = dataclasses.replace(plan.batch, shares=None)
    return resolve_plan(dataclasses.replace(plan, layout=layout, batch=batch), world_size)


def num_servers(plan: Plan) -> int:
    """How many parameter servers a plan wants beside its workers."""
    return plan.sync.servers if isinstance(plan.sync, ParameterServerConfig) else 0


def check_resumable(before: Plan, now: Plan) -> None:
    """Refuse to resume under a plan that differs in anything but when to stop, and who may come and go.

    The layout may differ, and the number of ranks with it, where no rank holds what the others do not (all-reduce
    without a codec): a checkpoint belongs to no layout.

    Raises:
        PlanError: naming the first table and key that differ.
    """
    movable = before.sync.kind == "allreduce" and before.codec.kind == "none"
    for table in dataclasses.fields(Plan):
        old, new = getattr(before, table.name), getattr(now, table.name)
        if table.name in ("stop", "elastic") or old == new or (movable and table.name == "layout"):
            continue
        if movable and table.name == "batch" and dataclasses.replace(old, shares=new.shares) == new:
            continue
        raise PlanError(
            f"cannot resume: {table.name} was {_difference(old, new)} when the run began, and is "
            f"{_difference(new, old)} now; resume with the run's own plan (leave --plan away), or start a new run"
        )


def _difference(one: Any, other: Any) -> str:
    if not dataclasses.is_dataclass(one) or type(one) is not type(other):
        return getattr(one, "kind", repr(one))
    names = [f.name for f in dataclasses.fields(one) if getattr(one, f.name) != getattr(other, f.name)]
    return ", ".join(f"{name}={getattr(one, name)!r}" for name in names)


def _is_bounded(stop: StopConfig) -> bool:
    limits = (stop.steps, stop.epochs, stop.seconds, stop.until)
    return bool(stop.patience) or any(limit is not None for limit in limits)


def _complete_layout(layout: LayoutConfig, world_size: int) -> LayoutConfig:
    replicate = layout.replicate or max(1, world_size // layout.ranks_per_replica)
    micro_batches = layout.micro_batches
    if layout.pipeline > 1 and micro_batches is None:
        micro_batches = 2 * layout.pipeline * layout.stages
    return dataclasses.replace(layout, replicate=replicate, micro_batches=micro_batches)


def _check_layout(plan: Plan, world_size: int) -> None:
    layout = plan.layout
    sizes = {axis: getattr(layout, axis) for axis in AXES}
    if math.prod(sizes.values()) == world_size:
        return
    if layout.ranks_per_replica == 1:
        raise PlanError(
            f"layout.replicate is {layout.replicate}, but there are {world_size} ranks; set it to {world_size}, "
            f"leave it out, or start {layout.replicate} ranks"
        )
    fitting = "; or ".join(_product(sizes) for sizes in nearest_products(layout, world_size))
    raise PlanError(
        f"the layout {_product(sizes)} needs {math.prod(sizes.values())} ranks, but there are {world_size}; the "
        f"nearest that fit are {fitting}"
    )


def _product(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "replicate 1"


def _check_batch(plan: Plan, world_size: int) -> None:
    shares = plan.batch.shares or ()
    feeds = world_size // (plan.layout.tensor * plan.layout.pipeline)
    if len(shares) != feeds:
        parts = f"{world_size} ranks" if feeds == world_size else f"{feeds} parts of a batch (replicate x shard)"
        raise PlanError(f"batch.shares has {len(shares)} weights, but there are {parts}; give one for each")
    if sum(shares) == 0:
        raise PlanError("batch.shares add up to 0; give at least one rank a weight above 0")
    if sum(shares) == math.inf:
        raise PlanError(
            "batch.shares are too large to add up; only their proportions count, so divide all by the largest"
        )
    if plan.batch.size < feeds:
        raise PlanError(
            f"batch.size is {plan.batch.size}, fewer than the {feeds} ranks that take samples; it counts the samples "
            f"of a step over all ranks, so set at least {feeds}"
        )


def _check_stop(plan: Plan, _: int) -> None:
    if plan.stop.until is not None:
        Until.parse(plan.stop.until)
    wants = [name for name, value in (("until", plan.stop.until), ("patience", plan.stop.patience)) if value]
    if wants and plan.validation.every == 0:
        raise PlanError(f"stop.{wants[0]} looks at validation, but validation.every is 0; set it to a number of steps")
