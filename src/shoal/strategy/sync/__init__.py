"""Syncs: how replicas agree. One file each; SYNCS is the family's table."""

from __future__ import annotations

from shoal.strategy.sync.allreduce import AllReduceConfig, AllReduceSync

SyncConfig = AllReduceConfig

SYNCS: dict[str, type[AllReduceSync]] = {
    "allreduce": AllReduceSync,
}

__all__ = ["SYNCS", "SyncConfig"]
