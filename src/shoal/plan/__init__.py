"""The plan: how a job is trained, as plain data that can be read, checked, stored and replayed."""

from shoal.plan.resolve import (
    check_resumable,
    dump_plan,
    for_ranks,
    load_plan,
    num_ranks,
    num_servers,
    parse_plan,
    plan_hash,
    resolve_plan,
    with_flags,
)
from shoal.plan.schema import Plan

__all__ = [
    "Plan",
    "check_resumable",
    "dump_plan",
    "for_ranks",
    "load_plan",
    "num_ranks",
    "num_servers",
    "parse_plan",
    "plan_hash",
    "resolve_plan",
    "with_flags",
]
