"""Puts state back into a rank's parts: from a checkpoint, or as a peer told it."""

from __future__ import annotations

from typing import Any

from shoal.engine.build import Parts
from shoal.engine.exchange import ReplicaExchange
from shoal.engine.layout.optimizer_state import load_named
from shoal.engine.progress import Progress


def restore(parts: Parts, state: dict[str, Any]) -> Progress:
    """Put a checkpoint's state into a rank's parts; return how far it had come."""
    parts.replica.load(state["model"])
    load_named(parts.optimizer, parts.replica, state["optimizer"])
    if parts.schedule is not None and state["schedule"] is not None:
        parts.schedule.load_state_dict(state["schedule"])
    return Progress.from_plain(state["progress"])


def restore_private(parts: Parts, exchange: ReplicaExchange, state: dict[str, Any]) -> None:
    """Put back what only this rank held."""
    if "optimizer" in state:
        parts.optimizer.load_state_dict(state.pop("optimizer"))
        schedule = state.pop("schedule")
        if parts.schedule is not None and schedule is not None:
            parts.schedule.load_state_dict(schedule)
    exchange.load_state_dict(state)
