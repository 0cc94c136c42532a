"""Syncs: how replicas agree. One file each; SYNCS is the family's table."""

from __future__ import annotations

from typing import Annotated, Any

import pydantic

from shoal.strategy.sync.allreduce import AllReduceConfig, AllReduceSync
from shoal.strategy.sync.gossip import GossipConfig, GossipSync
from shoal.strategy.sync.local import LocalConfig, LocalSync
from shoal.strategy.sync.parameter_server import ParameterServerConfig, ParameterServerSync

SyncConfig = Annotated[
    AllReduceConfig | LocalConfig | GossipConfig | ParameterServerConfig, pydantic.Field(discriminator="kind")
]

AnySync = AllReduceSync | LocalSync | GossipSync | ParameterServerSync

SYNCS: dict[str, type[Any]] = {
    "allreduce": AllReduceSync,
    "local": LocalSync,
    "gossip": GossipSync,
    "parameter_server": ParameterServerSync,
}

__all__ = ["SYNCS", "AnySync", "SyncConfig"]
