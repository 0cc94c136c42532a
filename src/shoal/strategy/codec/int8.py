"""8-bit integers with a scale for every chunk (Dettmers 2016), rounded to nearest.

The error of a value is at most 1/254 of the largest magnitude in its chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from shoal.strategy.codec.base import CodecOptions
from shoal.strategy.codec.chunks import ChunkSize
from shoal.strategy.codec.uniform import UniformCodec


@dataclass(frozen=True, kw_only=True)
class Int8Config(CodecOptions):
    """`[codec] kind = "int8"`.

    Attributes:
        chunk: values that share a scale of 4 bytes.
    """

    kind: Literal["int8"] = "int8"
    chunk: ChunkSize = 1024


class Int8Codec(UniformCodec):
    """One byte a value."""

    biased: ClassVar[bool] = True

    def __init__(self, config: Int8Config) -> None:
        super().__init__(127, config.chunk, stochastic=False)
