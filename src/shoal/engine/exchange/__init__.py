"""How one rank takes part in each sync: EXCHANGES is the table, by the sync's kind."""

from __future__ import annotations

from collections.abc import Callable

from shoal.engine.exchange.base import ReplicaExchange
from shoal.engine.exchange.gossip import GossipExchange
from shoal.engine.exchange.gradients import GradientExchange
from shoal.engine.exchange.local import LocalExchange
from shoal.engine.exchange.servers import ServersExchange

EXCHANGES: dict[str, Callable[..., ReplicaExchange]] = {
    "allreduce": GradientExchange,
    "local": LocalExchange,
    "gossip": GossipExchange,
    "parameter_server": ServersExchange,
}

__all__ = ["EXCHANGES", "ReplicaExchange"]
