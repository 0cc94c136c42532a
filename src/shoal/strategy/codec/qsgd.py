"""QSGD: rounding up or down at random, so that the mean is exact (Alistarh et al. 2017).

Normalised by the chunk's largest magnitude, as in the paper's experiments; codes have a fixed size in place of Elias's,
so that the bytes are known beforehand. With s levels, a value's variance is at most (max |x| / s)**2 / 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import pydantic

from shoal.strategy.codec.base import CodecOptions
from shoal.strategy.codec.chunks import ChunkSize
from shoal.strategy.codec.uniform import UniformCodec


@dataclass(frozen=True, kw_only=True)
class QsgdConfig(CodecOptions):
    """`[codec] kind = "qsgd"`.

    Attributes:
        levels: magnitudes above zero; 1 takes 2 bits a value, up to 7 take 4, up to 127 take 8.
        chunk: values that share a scale of 4 bytes.
    """

    kind: Literal["qsgd"] = "qsgd"
    levels: Annotated[int, pydantic.Field(ge=1, le=127)] = 7
    chunk: ChunkSize = 256


class QsgdCodec(UniformCodec):
    """A quarter of a byte, half a byte or a byte a value, without bias."""

    biased: ClassVar[bool] = False

    def __init__(self, config: QsgdConfig) -> None:
        super().__init__(config.levels, config.chunk, stochastic=True)
