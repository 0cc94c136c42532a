"""1-bit SGD: a value decodes to the mean of its chunk's positive or of its negative ones (Seide et al. 2014).

The two means are the best that a threshold at zero allows; in each half of a chunk the errors sum to zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from shoal.strategy.codec.base import CodecOptions
from shoal.strategy.codec.chunks import ChunkedCodec, ChunkSize, chunk_sizes, working_dtype


@dataclass(frozen=True, kw_only=True)
class OneBitConfig(CodecOptions):
    """`[codec] kind = "onebit"`.

    Attributes:
        chunk: values that share two means of 2 bytes each.
    """

    kind: Literal["onebit"] = "onebit"
    chunk: ChunkSize = 128


class OneBitCodec(ChunkedCodec):
    """One bit a value; zero counts as positive. On the wire is the means' own mean, and half their distance."""

    biased: ClassVar[bool] = True

    def __init__(self, config: OneBitConfig) -> None:
        super().__init__(config.chunk, 1, torch.bfloat16, 2)

    def _quantize(self, chunks: Tensor, num_values: int, key: int) -> tuple[Tensor, Tensor, Tensor]:
        dtype = working_dtype(chunks.dtype)
        negative = (chunks < 0).contiguous()
        num_negative = negative.view(torch.uint8).sum(dim=-1, keepdim=True, dtype=torch.int32)  # (rows, c, 1)
        num_positive = chunk_sizes(num_values, self._chunk, chunks) - num_negative
        magnitude = chunks.abs().sum(dim=-1, keepdim=True, dtype=dtype)
        total = chunks.sum(dim=-1, keepdim=True, dtype=dtype)
        positive_mean = (magnitude + total) / 2 / num_positive.clamp_(min=1)
        negative_mean = (total - magnitude) / 2 / num_negative.clamp_(min=1)
        heads = (
            torch.cat([positive_mean + negative_mean, positive_mean - negative_mean], dim=-1).div_(2).to(torch.bfloat16)
        )
        codes = negative.view(torch.uint8)
        return heads, codes, self._restore(heads, codes, dtype)

    def _restore(self, heads: Tensor, codes: Tensor, dtype: torch.dtype) -> Tensor:
        middle, half = heads.split(1, dim=-1)
        return codes.to(dtype).mul_(-2).add_(1).mul_(half).add_(middle)
