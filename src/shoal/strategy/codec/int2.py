"""2 bits a value: four levels, equally far apart, as fits a normal distribution best (Max 1960).

The levels are -1.5, -0.5, 0.5 and 1.5 scales. Values are told apart by a step of 1.25 of the chunk's mean magnitude;
the scale that is sent then makes the error smallest for the codes chosen, so that the error is a projection's: never
more than |x|**2, and about 0.12 |x|**2 where values are normal (one bit: 0.36).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from shoal.strategy.codec.base import CodecOptions
from shoal.strategy.codec.chunks import ChunkedCodec, ChunkSize, chunk_sizes, working_dtype

_STEP = 0.9957 * 1.2533  # Max's, in standard deviations, and how many mean magnitudes a normal distribution's one is


@dataclass(frozen=True, kw_only=True)
class Int2Config(CodecOptions):
    """`[codec] kind = "int2"`.

    Attributes:
        chunk: values that share a scale of 2 bytes.
    """

    kind: Literal["int2"] = "int2"
    chunk: ChunkSize = 128


class Int2Codec(ChunkedCodec):
    """A quarter of a byte a value; zero counts as positive."""

    biased: ClassVar[bool] = True

    def __init__(self, config: Int2Config) -> None:
        super().__init__(config.chunk, 2, torch.bfloat16, 1)

    def _quantize(self, chunks: Tensor, num_values: int, key: int) -> tuple[Tensor, Tensor, Tensor]:
        values = chunks.to(working_dtype(chunks.dtype))
        sizes = chunk_sizes(num_values, self._chunk, chunks)
        scratch = values.abs()  # fresh memory costs more than arithmetic: one piece serves for all that follows
        mean = scratch.sum(dim=-1, keepdim=True).div_(sizes)  # (rows, c, 1)
        step = mean.mul_(_STEP).clamp_(min=2.0**-120)
        level = torch.mul(values, 1 / step, out=scratch).add_(2).clamp_(0, 3)
        codes = level.to(torch.uint8, memory_format=torch.contiguous_format)
        codes.bitwise_and_(3)  # NaN becomes any byte
        level.copy_(codes).sub_(1.5)
        along = torch.linalg.vecdot(values, level).unsqueeze(-1)  # the row's end is filled up with zeros: no part in it
        num_inner = (codes >> 1).bitwise_xor_(codes).bitwise_and_(1).sum(dim=-1, keepdim=True, dtype=torch.int32)
        num_inner -= (self._chunk - sizes).to(torch.int32)  # but have codes
        scale = (along / (2.25 * sizes - 2 * num_inner)).to(torch.bfloat16)
        return scale, codes, level.mul_(scale)

    def _restore(self, heads: Tensor, codes: Tensor, dtype: torch.dtype) -> Tensor:
        return codes.to(dtype).sub_(1.5).mul_(heads)
