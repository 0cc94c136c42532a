"""Finds a model's blocks: what it repeats, the natural parts to shard, recompute and cut a pipeline between."""

from __future__ import annotations

from torch import nn

_CONTAINERS = (nn.Sequential, nn.ModuleList)


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The elements of the outermost lists of modules, by name, in the model's order; only those with parameters.

    A list counts if it holds two modules or more; a model that is such a list is its elements.
    """
    found: dict[str, nn.Module] = {}
    _collect(model, "", found)
    return {name: module for name, module in found.items() if any(True for _ in module.parameters())}


def _collect(module: nn.Module, prefix: str, found: dict[str, nn.Module]) -> None:
    if isinstance(module, _CONTAINERS) and len(module) > 1:
        found.update({f"{prefix}{name}": child for name, child in module.named_children()})
        return
    for name, child in module.named_children():
        _collect(child, f"{prefix}{name}.", found)
