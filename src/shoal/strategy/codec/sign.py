"""Scaled signs: one bit a value, a mean magnitude a chunk (Bernstein et al. 2018; Karimireddy et al. 2019).

For a chunk x of d values, |x - decoded|**2 = |x|**2 - |x|_1**2 / d: a contraction, which error feedback needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from shoal.strategy.codec.base import CodecOptions
from shoal.strategy.codec.chunks import ChunkedCodec, ChunkSize, chunk_sizes, working_dtype


@dataclass(frozen=True, kw_only=True)
class SignConfig(CodecOptions):
    """`[codec] kind = "sign"`.

    Attributes:
        chunk: values that share a mean magnitude of 2 bytes.
    """

    kind: Literal["sign"] = "sign"
    chunk: ChunkSize = 128


class SignCodec(ChunkedCodec):
    """One bit a value; zero counts as positive."""

    biased: ClassVar[bool] = True

    def __init__(self, config: SignConfig) -> None:
        super().__init__(config.chunk, 1, torch.bfloat16, 1)

    def _quantize(self, chunks: Tensor, num_values: int, key: int) -> tuple[Tensor, Tensor, Tensor]:
        total = chunks.abs().sum(dim=-1, keepdim=True, dtype=working_dtype(chunks.dtype))  # (rows, c, 1)
        mean = (total / chunk_sizes(num_values, self._chunk, chunks)).to(torch.bfloat16)
        negative = (chunks < 0).contiguous().view(torch.uint8)
        return mean, negative, self._restore(mean, negative, working_dtype(chunks.dtype))

    def _restore(self, heads: Tensor, codes: Tensor, dtype: torch.dtype) -> Tensor:
        return codes.to(dtype).mul_(-2).add_(1).mul_(heads)
