"""Top-k: the largest magnitudes only (Aji and Heafield 2017; Stich et al. 2018), the k largest of every 256 values.

Within 256 values a place takes one byte, every message has the same size, and choosing needs k rounds of a maximum in
place of a sort. What is kept of d values leaves an error of at most (1 - k / d) |x|**2, and bfloat16's rounding of
what is kept. Values closer than one part in 2**15 may be taken for equal; the later one goes first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import pydantic
import torch
from torch import Tensor

from shoal.strategy.codec.base import CodecOptions
from shoal.strategy.codec.chunks import chunked
from shoal.strategy.codec.packing import section

_CHUNK = 256
_MAGNITUDE = 0x7FFFFF00  # of fp32's bits: all but the sign, and the 8 that make room for the place in the chunk


@dataclass(frozen=True, kw_only=True)
class TopKConfig(CodecOptions):
    """`[codec] kind = "topk"`.

    Attributes:
        ratio: the part of the values that is sent, rounded to a whole number of every 256 and at least one.
    """

    kind: Literal["topk"] = "topk"
    ratio: Annotated[float, pydantic.Field(gt=0, le=1)] = 0.0625


class TopKCodec:
    """3 bytes for each value that is sent."""

    linear: ClassVar[bool] = False
    biased: ClassVar[bool] = True

    def __init__(self, config: TopKConfig) -> None:
        self._ratio = config.ratio

    def encode(self, values: Tensor, key: int) -> Tensor:
        """Places, one byte each, chunk after chunk; then the values there in bfloat16."""
        rows, n = values.shape
        if values.numel() == 0:
            return values.new_empty((rows, self.size_bytes(n, 0)), dtype=torch.uint8)
        chunk, k = self._cut(n)
        chunks = chunked(values, chunk)
        places = _largest(chunks, k)  # (rows, c, k)
        kept = chunks.gather(-1, places).to(torch.bfloat16).view(rows, -1)
        return torch.cat([places.to(torch.uint8).view(rows, -1), kept.view(torch.uint8)], dim=1)

    def decode(self, payload: Tensor, num_values: int, like: Tensor) -> Tensor:
        """Zeros but where a value was sent, shape (rows, n)."""
        rows = len(payload)
        if rows * num_values == 0:
            return like.new_empty((rows, num_values))
        chunk, k = self._cut(num_values)
        num_chunks = -(-num_values // chunk)
        places = payload[:, : num_chunks * k].long().view(rows, num_chunks, k)
        kept = section(payload, num_chunks * k, None, torch.bfloat16).view(rows, num_chunks, k)
        values = like.new_zeros((rows, num_chunks, chunk)).scatter_(-1, places, kept.to(like.dtype))
        return values.view(rows, -1)[:, :num_values]

    def size_bytes(self, num_values: int, item_bytes: int) -> int:
        """3 k for every chunk begun."""
        if num_values == 0:
            return 0
        chunk, k = self._cut(num_values)
        return 3 * k * -(-num_values // chunk)

    def _cut(self, num_values: int) -> tuple[int, int]:
        """(values in a chunk, how many of them are kept)."""
        chunk = min(_CHUNK, num_values)
        return chunk, max(1, round(self._ratio * chunk))


def _largest(chunks: Tensor, k: int) -> Tensor:
    """Places of the k largest magnitudes in the last dimension, at most 256 long: int64, shape (..., k).

    A value's bits without the sign, read as an integer, are in order of magnitude, NaN above all; the place takes the
    lowest bits, so that one maximum finds both.
    """
    bits = chunks.float().view(torch.int32)
    ranked = (bits & _MAGNITUDE).bitwise_or_(torch.arange(bits.shape[-1], dtype=torch.int32, device=bits.device))
    found = []
    for _ in range(k):
        places = (ranked.amax(dim=-1, keepdim=True) & (_CHUNK - 1)).long()
        ranked.scatter_(-1, places, -1)
        found.append(places)
    return torch.cat(found, dim=-1)
