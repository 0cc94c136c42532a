"""From a plan to the strategy's own parts: the same for who trains and for who prices."""

from __future__ import annotations

import dataclasses

from shoal.plan.schema import Plan
from shoal.strategy.codec import make_codec
from shoal.strategy.codec.feedback import Coder
from shoal.strategy.sync import SYNCS, AnySync
from shoal.strategy.topology import Topology


def build_sync(plan: Plan, topology: Topology, coder: Coder | None) -> AnySync:
    """The plan's sync."""
    sync: AnySync = SYNCS[plan.sync.kind](plan.sync, coder, topology)
    return sync


def build_coder(plan: Plan, topology: Topology) -> Coder | None:
    """The plan's codec with its memory; None where values go as they are."""
    if plan.codec.kind == "none":
        return None
    options = plan.codec
    if plan.sync.kind == "gossip":  # it sends differences to what was told before: an error feedback of its own
        options = dataclasses.replace(options, error_feedback=False)
    return Coder(make_codec(options), options, rank=topology.rank, seed=plan.seed)
