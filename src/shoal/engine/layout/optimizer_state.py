"""An optimizer's state by the names of its parameters, the same under every layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from shoal.engine.layout.replica import Held, Replica


def named_state(optimizer: Optimizer, replica: Replica) -> dict[str, Any]:
    """State by name, and the groups with names in place of parameters. The tensors are the optimizer's own."""
    names = {id(held.local): held.name for held in replica.held}
    plain = optimizer.state_dict()
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    return {
        "state": {order[index]: values for index, values in plain["state"].items()},
        "groups": [group | {"params": [order[index] for index in group["params"]]} for group in plain["param_groups"]],
    }


def load_named(optimizer: Optimizer, replica: Replica, saved: Mapping[str, Any]) -> None:
    """Take over what `named_state` gave, under this or another layout; values may be whole or this rank's."""
    held = {id(h.local): h for h in replica.held}
    order = [held[id(p)] for group in optimizer.param_groups for p in group["params"]]
    places = {h.name: place for place, h in enumerate(order)}
    state = {
        place: {key: _part(value, order[place]) for key, value in saved["state"][name].items()}
        for name, place in places.items()
        if name in saved["state"]
    }
    groups = []
    for index, group in enumerate(optimizer.param_groups):
        own = [held[id(p)].name for p in group["params"]]
        groups.append(_settings(saved["groups"], own, index) | {"params": [places[name] for name in own]})
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _part(value: Any, held: Held) -> Any:
    is_whole = isinstance(value, Tensor) and held.region.shape and tuple(value.shape) == held.region.shape
    return held.region.take(value) if is_whole and not held.region.is_whole else value


def _settings(saved: list[dict[str, Any]], names: list[str], index: int) -> dict[str, Any]:
    """What the group of these parameters had: learning rate and the like."""
    for group in saved:
        if set(names) & set(group["params"]):
            return dict(group)
    return dict(saved[min(index, len(saved) - 1)])
