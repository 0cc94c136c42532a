"""4-bit integers with a scale for every chunk, two values a byte, rounded to nearest.

The error of a value is at most 1/14 of the largest magnitude in its chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from shoal.strategy.codec.base import CodecOptions
from shoal.strategy.codec.chunks import ChunkSize
from shoal.strategy.codec.uniform import UniformCodec


@dataclass(frozen=True, kw_only=True)
class Int4Config(CodecOptions):
    """`[codec] kind = "int4"`.

    Attributes:
        chunk: values that share a scale of 4 bytes.
    """

    kind: Literal["int4"] = "int4"
    chunk: ChunkSize = 256


class Int4Codec(UniformCodec):
    """Half a byte a value."""

    biased: ClassVar[bool] = True

    def __init__(self, config: Int4Config) -> None:
        super().__init__(7, config.chunk, stochastic=False)
