"""How one rank takes part in each sync: EXCHANGES is the table, by the sync's kind."""

from __future__ import annotations

from collections.abc import Callable

from shoal.engine.exchange.backup import BackupExchange
from shoal.engine.exchange.base import ReplicaExchange, Wiring
from shoal.engine.exchange.gossip import GossipExchange
from shoal.engine.exchange.gradients import GradientExchange
from shoal.engine.exchange.local import LocalExchange
from shoal.engine.exchange.pairs import PairsExchange
from shoal.engine.exchange.servers import ServersExchange
from shoal.strategy.codec.feedback import Coder
from shoal.strategy.sync.allreduce import AllReduceSync
from shoal.strategy.sync.gossip import GossipSync


def _gossip(wiring: Wiring, sync: GossipSync, coder: Coder | None) -> ReplicaExchange:
    kind = PairsExchange if sync.config.mode == "asynchronous" else GossipExchange
    return kind(wiring, sync, coder)


def _gradients(wiring: Wiring, sync: AllReduceSync, coder: Coder | None) -> ReplicaExchange:
    kind = BackupExchange if sync.config.backup else GradientExchange
    return kind(wiring, sync, coder)


EXCHANGES: dict[str, Callable[..., ReplicaExchange]] = {
    "allreduce": _gradients,
    "local": LocalExchange,
    "gossip": _gossip,
    "parameter_server": ServersExchange,
}

UNEQUAL = frozenset({"gossip", "local", "parameter_server"})
"""Kinds whose ranks hold different values between steps."""

__all__ = ["EXCHANGES", "UNEQUAL", "ReplicaExchange"]
