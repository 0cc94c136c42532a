"""Half precision with a power of two for every chunk, so that nothing overflows and little underflows.

Scaling is exact. A value's relative error is at most 2**-11 down to 2**-28 of the largest magnitude in its chunk, and
below that its absolute error at most 2**-39 of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from shoal.strategy.codec.base import CodecOptions
from shoal.strategy.codec.chunks import ChunkSize, chunked
from shoal.strategy.codec.packing import section

_EXPONENT = 0x7F800000  # the bits of fp32's exponent
_SMALLEST, _TOP = 2.0**-100, 2.0**-14  # the largest magnitude comes to lie in [2**14, 2**15): half the range is spare


@dataclass(frozen=True, kw_only=True)
class Fp16Config(CodecOptions):
    """`[codec] kind = "fp16"`.

    Attributes:
        chunk: values that share a scale of 4 bytes.
    """

    kind: Literal["fp16"] = "fp16"
    chunk: ChunkSize = 1024


class Fp16Codec:
    """Two bytes a value."""

    linear: ClassVar[bool] = False
    biased: ClassVar[bool] = False

    def __init__(self, config: Fp16Config) -> None:
        self._chunk = config.chunk

    def encode(self, values: Tensor, key: int) -> Tensor:
        """Scales, shape (rows, 4 ceil(n / chunk)), then halves, shape (rows, 2 n)."""
        rows, n = values.shape
        if values.numel() == 0:
            return values.new_empty((rows, self.size_bytes(n, 0)), dtype=torch.uint8)
        chunks = chunked(values, self._chunk)
        largest = chunks.abs().amax(dim=-1, keepdim=True).float().contiguous()  # (rows, c, 1)
        power = (largest.view(torch.int32) & _EXPONENT).view(torch.float32)
        scale = power.clamp_(min=_SMALLEST).mul_(_TOP)
        halves = (chunks * (1 / scale)).to(torch.float16, memory_format=torch.contiguous_format).view(rows, -1)[:, :n]
        return torch.cat([scale.view(rows, -1).view(torch.uint8), halves.contiguous().view(torch.uint8)], dim=1)

    def decode(self, payload: Tensor, num_values: int, like: Tensor) -> Tensor:
        """Widen and scale back, shape (rows, n)."""
        rows = len(payload)
        if rows * num_values == 0:
            return like.new_empty((rows, num_values))
        head_bytes = 4 * -(-num_values // self._chunk)
        scale = section(payload, 0, head_bytes, torch.float32)
        halves = chunked(section(payload, head_bytes, None, torch.float16), self._chunk)
        return (halves * scale.unsqueeze(-1)).view(rows, -1)[:, :num_values].to(like.dtype)

    def size_bytes(self, num_values: int, item_bytes: int) -> int:
        """2 n and 4 for every chunk begun."""
        return 2 * num_values + 4 * -(-num_values // self._chunk)
