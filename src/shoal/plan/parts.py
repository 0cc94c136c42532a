"""From a plan to the strategy's own parts: the same for who trains and for who prices."""

from __future__ import annotations

import dataclasses

from shoal.plan.schema import Plan
from shoal.strategy.codec import make_codec
from shoal.strategy.codec.feedback import Coder
from shoal.strategy.codec.int8 import Int8Config
from shoal.strategy.sync import SYNCS, AnySync
from shoal.strategy.topology import Topology

_LEARNING = Int8Config(chunk=128, error_feedback=False)
"""How gradients for Adam's second moment go: each within 1/254 of its chunk's largest."""


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
    learning = Coder(make_codec(_LEARNING), _LEARNING, rank=topology.rank) if options.variance_every else None
    return Coder(make_codec(options), options, rank=topology.rank, seed=plan.seed, learning=learning)
