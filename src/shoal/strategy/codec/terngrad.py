"""TernGrad: each value is 0 or plus or minus the chunk's largest magnitude, at random (Wen et al. 2017).

P(not 0) = |x| / max |x|, so the mean is exact and the variance |x| (max |x| - |x|). Chunks take the place of the
paper's layers; the paper's clipping, which would add a bias, is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from shoal.strategy.codec.base import CodecOptions
from shoal.strategy.codec.chunks import ChunkSize
from shoal.strategy.codec.uniform import UniformCodec


@dataclass(frozen=True, kw_only=True)
class TernGradConfig(CodecOptions):
    """`[codec] kind = "terngrad"`.

    Attributes:
        chunk: values that share a scale of 4 bytes.
    """

    kind: Literal["terngrad"] = "terngrad"
    chunk: ChunkSize = 256


class TernGradCodec(UniformCodec):
    """2 bits a value, without bias."""

    biased: ClassVar[bool] = False

    def __init__(self, config: TernGradConfig) -> None:
        super().__init__(1, config.chunk, stochastic=True)
