"""Uniform symmetric quantization: each value a whole multiple of its chunk's scale, which is max |x| / levels.

What int8, int4, QSGD and TernGrad have in common. Rounded to nearest, the error is at most half a scale; rounded up or
down at random, in proportion to the distance, it is at most one scale and zero on average.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.strategy.codec.chunks import ChunkedCodec, working_dtype
from shoal.strategy.codec.draw import uniform

_SMALLEST_SCALE = 2.0**-126  # fp32's smallest normal number: its inverse is finite
_SHRINK = 1 - 2.0**-22  # keeps the largest value below levels + 1 when it is rounded up


class UniformCodec(ChunkedCodec):
    """Codes from -levels to levels. A chunk with a value that is not finite decodes to nothing finite."""

    def __init__(self, levels: int, chunk: int, *, stochastic: bool) -> None:
        bits = next(bits for bits in (2, 4, 8) if levels < 1 << (bits - 1))
        super().__init__(chunk, bits, torch.float32, 1)
        self._levels = levels
        self._stochastic = stochastic
        self._offset = 0 if bits == 8 else levels

    def _quantize(self, chunks: Tensor, num_values: int, key: int) -> tuple[Tensor, Tensor, Tensor]:
        values = chunks.to(working_dtype(chunks.dtype))
        scratch = values.abs()  # fresh memory costs more than arithmetic: one piece serves for all that follows
        largest = scratch.amax(dim=-1, keepdim=True).float()  # (rows, c, 1)
        scale = (largest / self._levels).clamp_(min=_SMALLEST_SCALE)
        if self._stochastic:
            level = torch.mul(values, _SHRINK / scale, out=scratch)
            level.add_(uniform(key, level.shape, level)).floor_()
        else:
            level = torch.mul(values, 1 / scale, out=scratch).round_()
        signed = level.to(torch.int8, memory_format=torch.contiguous_format)
        if self._offset:
            signed.add_(self._offset)
        return scale, signed.view(torch.uint8), level.mul_(scale)

    def _restore(self, heads: Tensor, codes: Tensor, dtype: torch.dtype) -> Tensor:
        signed = codes.view(torch.int8)
        if self._offset:
            signed = signed.sub_(self._offset)
        return signed.to(dtype).mul_(heads)
