"""Gathers what a checkpoint holds: what all ranks have in common, and what this rank alone holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shoal.engine.build import Parts
from shoal.engine.checkpoint.pieces import KEY, fits_twice, pieces_of
from shoal.engine.exchange import ReplicaExchange
from shoal.engine.exchange.base import copied
from shoal.engine.layout.optimizer_state import named_state


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Live state; see `CheckpointSession.save` for how long which part of it must not change.

    Attributes:
        state: the same on all ranks that hold the same values.
        private: what this rank alone holds.
        must_wait: there is no room for a copy: nothing may change until it is written.
    """

    state: dict[str, Any]
    private: dict[str, Any]
    must_wait: bool


def snapshot(
    parts: Parts,
    exchange: ReplicaExchange,
    told: Mapping[str, Any],
    *,
    writes_pieces: bool,
    may_change: bool,
) -> Snapshot:
    """Gather it.

    Args:
        told: what belongs to the state beside the parts, plain.
        writes_pieces: of the ranks that hold the same values, this one writes them.
        may_change: training goes on meanwhile.
    """
    private = exchange.state_dict()
    schedule = parts.schedule.state_dict() if parts.schedule else None
    if not exchange.replicas_equal:
        private |= copied({"optimizer": parts.optimizer.state_dict(), "schedule": schedule})
    model, optimizer = exchange.model_state(), named_state(parts.optimizer, parts.replica)
    must_wait = not may_change
    if not parts.replica.is_whole:
        pieces = pieces_of(parts.replica, model, optimizer) if writes_pieces else {}
        must_wait = must_wait or not fits_twice(pieces)
        private[KEY] = pieces if must_wait else copied(pieces)
        model, optimizer = {}, {}
    state = {"model": model, "optimizer": optimizer, "schedule": schedule, **told}
    return Snapshot(state=state, private=private, must_wait=must_wait)
