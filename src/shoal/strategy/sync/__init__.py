"""Syncs: how replicas agree. One file each; SYNCS is the family's table."""

from __future__ import annotations

from typing import Annotated, Any

import pydantic

from shoal.strategy.sync.allreduce import AllReduceConfig, AllReduceSync
from shoal.strategy.sync.gossip import GossipConfig, GossipSync
from shoal.strategy.sync.local import LocalConfig, LocalSync

SyncConfig = Annotated[AllReduceConfig | LocalConfig | GossipConfig, pydantic.Field(discriminator="kind")]

AnySync = AllReduceSync | LocalSync | GossipSync

SYNCS: dict[str, type[Any]] = {
    "allreduce": AllReduceSync,
    "local": LocalSync,
    "gossip": GossipSync,
}

__all__ = ["SYNCS", "AnySync", "SyncConfig"]
