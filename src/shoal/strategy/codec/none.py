"""The identity codec: values go on the wire as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from shoal.strategy.bucket import Piece
from shoal.strategy.codec.base import CodecOptions, Projection


@dataclass(frozen=True, kw_only=True)
class NoneConfig(CodecOptions):
    """`[codec] kind = "none"`."""

    kind: Literal["none"] = "none"


class NoneCodec:
    """Values as they are."""

    linear: ClassVar[bool] = True
    biased: ClassVar[bool] = False

    def __init__(self, config: NoneConfig) -> None:
        del config  # it has no settings

    def encode(self, values: Tensor, key: int) -> Tensor:
        """The same bytes, shape (rows, n * item size)."""
        return values.contiguous().view(torch.uint8)

    def decode(self, payload: Tensor, num_values: int, like: Tensor) -> Tensor:
        """The same values, shape (rows, n)."""
        return payload.view(like.dtype)

    def size_bytes(self, num_values: int, item_bytes: int) -> int:
        """n * item size."""
        return num_values * item_bytes

    def project(self, values: Tensor, pieces: Sequence[Piece], memory: dict[str, Tensor], key: int) -> Projection:
        """The sum itself."""
        total = values.clone()
        yield total
        return total, values
