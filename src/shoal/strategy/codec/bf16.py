"""bfloat16 on the wire: half the bytes of fp32, the same range, 8 bits of mantissa (Kalamkar et al. 2019).

Rounded to nearest even, so a value's relative error is at most 2**-8; sums are made in full precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from shoal.strategy.codec.base import CodecOptions


@dataclass(frozen=True, kw_only=True)
class Bf16Config(CodecOptions):
    """`[codec] kind = "bf16"`."""

    kind: Literal["bf16"] = "bf16"


class Bf16Codec:
    """Two bytes a value."""

    linear: ClassVar[bool] = False
    biased: ClassVar[bool] = False

    def __init__(self, config: Bf16Config) -> None:
        del config  # it has no settings

    def encode(self, values: Tensor, key: int) -> Tensor:
        """Round to bfloat16, shape (rows, 2 n)."""
        return values.to(torch.bfloat16).contiguous().view(torch.uint8)

    def decode(self, payload: Tensor, num_values: int, like: Tensor) -> Tensor:
        """Widen to the dtype of `like`, shape (rows, n)."""
        if payload.numel() == 0:  # torch cannot view no bytes as anything wider
            return like.new_empty((len(payload), num_values))
        return payload.view(torch.bfloat16).to(like.dtype)

    def size_bytes(self, num_values: int, item_bytes: int) -> int:
        """2 n, whatever the values' own size."""
        return 2 * num_values
