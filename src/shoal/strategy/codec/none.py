"""The identity codec: values go on the wire as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from shoal.strict_toml import STRICT


@dataclass(frozen=True, kw_only=True)
class NoneConfig:
    """`[codec] kind = "none"`."""

    __pydantic_config__: ClassVar = STRICT
    kind: Literal["none"] = "none"


class NoneCodec:
    """Values as they are."""

    linear = True

    def encode(self, values: Tensor) -> Tensor:
        """The same bytes, shape (rows, n * item size)."""
        return values.contiguous().view(torch.uint8)

    def decode(self, payload: Tensor, like: Tensor) -> Tensor:
        """The same values, shape (rows, n)."""
        return payload.view(like.dtype)

    def size_bytes(self, num_values: int, item_bytes: int) -> int:
        """n * item size."""
        return num_values * item_bytes
