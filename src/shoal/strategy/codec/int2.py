"""2 bits a value: four levels, equally far apart, as fits a normal distribution best (Max 1960).

The levels are -1.5, -0.5, 0.5 and 1.5 scales. Values are told apart by a step of 0.996 of the chunk's root mean square;
the scale that is sent then makes the error smallest for the codes chosen, so that the error is a projection's: never more
than |x|**2, and about 0.12 |x|**2 where values are normal (one bit: 0.36).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from shoal.strategy.codec.base import CodecOptions
from shoal.strategy.codec.chunks import ChunkedCodec, ChunkSize, chunk_sizes, working_dtype

_STEP = 0.9957  # in standard deviations


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
        dtype = working_dtype(chunks.dtype)
        sizes = chunk_sizes(num_values, self._chunk, chunks)
        largest = chunks.abs().amax(dim=-1, keepdim=True).to(dtype).clamp_(min=torch.finfo(dtype).tiny)  # (rows, c, 1)
        scaled = chunks / largest  # so that squares neither overflow nor vanish
        mean_square = scaled.square().sum(dim=-1, keepdim=True).div_(sizes)
        step = mean_square.sqrt_().mul_(_STEP).clamp_(min=torch.finfo(dtype).tiny)
        level = (scaled / step).floor_().clamp_(-2, 1).add_(0.5)
        along = scaled.mul_(level).sum(dim=-1, keepdim=True)  # zeros beyond the row's end add nothing
        square = level.square().sum(dim=-1, keepdim=True).sub_((self._chunk - sizes) / 4)  # but to this they do
        scale = (along / square).mul_(largest).to(torch.bfloat16)
        codes = (level + 1.5).to(torch.uint8, memory_format=torch.contiguous_format).bitwise_and_(3)
        return scale, codes, level.mul_(scale)

    def _restore(self, heads: Tensor, codes: Tensor, dtype: torch.dtype) -> Tensor:
        return codes.to(dtype).sub_(1.5).mul_(heads)
