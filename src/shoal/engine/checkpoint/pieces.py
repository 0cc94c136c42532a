"""A model and its optimizer in pieces: each rank writes what it holds, and says which part of the whole that is.

So a checkpoint belongs to no layout: whoever reads one puts together what it wants, parameter by parameter.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import safetensors
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from shoal.engine.checkpoint import archive, tree
from shoal.engine.layout.replica import Replica
from shoal.errors import CheckpointError
from shoal.strategy.layout.region import Region

KEY = "pieces"
"""Under which a rank's own part of a checkpoint has them."""


def pieces_of(replica: Replica, model: Mapping[str, Tensor], optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """What this rank adds to a checkpoint.

    Args:
        model: values by name, from `Replica.state_dict`.
        optimizer: from `named_state`.
    """
    regions = {held.name: held.region.to_plain() for held in replica.parameters}
    return {
        "parameters": {name: {"region": region, "values": model[name]} for name, region in regions.items()},
        "buffers": {name: value for name, value in model.items() if name not in regions},
        "tied": dict(replica.tied),
        "state": {name: dict(values) for name, values in optimizer["state"].items()},
        "groups": list(optimizer["groups"]),
    }


def fits_twice(pieces: Any) -> bool:
    """Whether a copy of nested tensors would leave most of the machine's free memory free."""
    tensors = [value for value in tree_flatten(pieces)[0] if isinstance(value, Tensor)]
    size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return size_bytes < psutil.virtual_memory().available / 8


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file, not read yet."""

    path: Path
    name: str

    def load(self) -> Tensor:
        with safetensors.safe_open(self.path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(self.name)
        return tensor


class _Names(Mapping[str, _Stored]):
    """Stands in for a file's tensors while its document is read."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __getitem__(self, name: str) -> _Stored:
        return _Stored(self._path, name)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


class Whole(Mapping[str, Any]):
    """Whole values by name, put together when they are asked for: parameters, buffers, second names of tied ones."""

    def __init__(
        self, parts: Mapping[str, list[tuple[Region, Any]]], buffers: Mapping[str, Any], tied: Mapping[str, str]
    ) -> None:
        self._parts = parts
        self._tied = tied
        self._buffers = buffers

    def __getitem__(self, name: str) -> Tensor:
        name = self._tied.get(name, name)
        if name in self._parts:
            return _together(name, self._parts[name])
        buffer: Tensor = _load(self._buffers[name])
        return buffer

    def __iter__(self) -> Iterator[str]:
        yield from self._parts
        yield from self._buffers
        yield from self._tied

    def __len__(self) -> int:
        return len(self._parts) + len(self._buffers) + len(self._tied)


class WholeState(Mapping[str, Any]):
    """The optimizer's state by parameter: each a dictionary of whole tensors and numbers."""

    def __init__(self, parts: Mapping[str, list[tuple[Region, Mapping[str, Any]]]]) -> None:
        self._parts = parts

    def __getitem__(self, name: str) -> dict[str, Any]:
        pieces = self._parts[name]
        keys = {key: value for _, values in pieces for key, value in values.items()}
        return {key: self._value(f"{name}'s {key}", key, pieces) for key in keys}

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def _value(self, what: str, key: str, pieces: list[tuple[Region, Mapping[str, Any]]]) -> Any:
        stored = [(region, _load(values[key])) for region, values in pieces if key in values]
        region, first = stored[0]
        if isinstance(first, Tensor) and region.shape and tuple(first.shape) == region.local_shape:
            return _together(what, stored)
        return first


def read_pieces(path: Path) -> tuple[Whole, dict[str, Any]] | None:
    """The model and the optimizer's named state of a checkpoint in pieces; None if it is not in pieces.

    Raises:
        CheckpointError: a file cannot be read.
    """
    documents = [_document(file) for file in sorted(path.glob("rank-*.json"))]
    found = [document[KEY] for document in documents if document.get(KEY)]
    if not found:
        return None
    parameters: dict[str, list[tuple[Region, Any]]] = {}
    state: dict[str, list[tuple[Region, Mapping[str, Any]]]] = {}
    buffers: dict[str, Any] = {}
    tied: dict[str, str] = {}
    groups: list[dict[str, Any]] = []
    for document in found:
        buffers |= document["buffers"]
        tied |= document["tied"]
        groups += document["groups"]
        for name, piece in document["parameters"].items():
            region = Region.from_plain(piece["region"])
            if region in [known for known, _ in parameters.get(name, ())]:
                continue
            parameters.setdefault(name, []).append((region, piece["values"]))
            if name in document["state"]:
                state.setdefault(name, []).append((region, document["state"][name]))
    return Whole(parameters, buffers, tied), {"state": WholeState(state), "groups": groups}


def _document(path: Path) -> dict[str, Any]:
    with archive.damage_named(path.parent):
        document: dict[str, Any] = tree.decode(json.loads(path.read_text()), _Names(path.with_suffix(".safetensors")))
    return document


def _load(value: Any) -> Any:
    return value.load() if isinstance(value, _Stored) else value


def _together(what: str, pieces: list[tuple[Region, Any]]) -> Tensor:
    region = pieces[0][0]
    first: Tensor = _load(pieces[0][1])
    if region.is_whole:
        return first
    whole = torch.empty(region.shape, dtype=first.dtype)
    missing = whole.numel()
    for part, value in pieces:
        part.put(_load(value), whole)
        missing -= part.num_values
    if missing:
        raise CheckpointError(
            f"the checkpoint is incomplete: {missing} of {whole.numel()} values of {what} are in no rank's file"
        )
    return whole
