"""A state dict as JSON and named tensors: what a checkpoint stores, without pickle.

Dictionaries with any plain keys, lists, tuples, numbers, strings and None become JSON; tensors are taken out and stand
in it by name. A tensor that occurs twice (tied parameters) is stored once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shoal.errors import CheckpointError

Json = Any


def encode(value: Any, path: str) -> tuple[Json, dict[str, Tensor]]:
    """Take the tensors out of `value`. They are the state's own, not copies.

    Args:
        path: how to call the root, in tensor names and messages ("model", "optimizer").

    Raises:
        CheckpointError: something in it has no plain form.
    """
    encoder = _Encoder()
    return encoder.encode(value, path), encoder.tensors


def decode(value: Json, tensors: Mapping[str, Any]) -> Any:
    """Put the tensors back: the inverse of `encode`."""
    match value:
        case {"tensor": name}:
            return tensors[name]
        case {"tuple": items}:
            return tuple(decode(item, tensors) for item in items)
        case {"items": pairs}:
            return {key: decode(item, tensors) for key, item in pairs}
        case list():
            return [decode(item, tensors) for item in value]
        case _:
            return value


class _Encoder:
    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[tuple[Any, ...], str] = {}

    def encode(self, value: Any, path: str) -> Json:
        match value:
            case None | bool() | int() | float() | str():
                return value
            case Tensor():
                return {"tensor": self._name(value.detach(), path)}
            case tuple():
                return {"tuple": [self.encode(item, f"{path}.{i}") for i, item in enumerate(value)]}
            case list():
                return [self.encode(item, f"{path}.{i}") for i, item in enumerate(value)]
            case dict():
                return {"items": [self._pair(key, item, path) for key, item in value.items()]}
            case _:
                raise CheckpointError(
                    f"cannot save {path}: got {type(value).__name__}, expected tensors, numbers, strings, and "
                    "dictionaries, lists and tuples of them"
                )

    def _pair(self, key: Any, item: Any, path: str) -> list[Json]:
        if not isinstance(key, str | int):
            raise CheckpointError(f"cannot save {path}: a key is {type(key).__name__}, expected a string or an integer")
        return [key, self.encode(item, f"{path}.{key}")]

    def _name(self, tensor: Tensor, path: str) -> str:
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise CheckpointError(f"cannot save {path}: the tensor is {tensor.layout}, expected a dense one")
        identity = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else (path,)
        name = self._names.setdefault(identity, path)
        self.tensors[name] = tensor
        return name
