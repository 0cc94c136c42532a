"""Codecs: what goes on the wire. One file each; CODECS is the family's table."""

from __future__ import annotations

from typing import Annotated

import pydantic

from shoal.strategy.codec.base import Codec
from shoal.strategy.codec.bf16 import Bf16Codec, Bf16Config
from shoal.strategy.codec.none import NoneCodec, NoneConfig

CodecConfig = Annotated[NoneConfig | Bf16Config, pydantic.Field(discriminator="kind")]

CODECS: dict[str, type[Codec]] = {
    "none": NoneCodec,
    "bf16": Bf16Codec,
}


def make_codec(config: CodecConfig) -> Codec:
    """The codec that a table of the plan describes."""
    return CODECS[config.kind](config)


__all__ = ["CODECS", "Codec", "CodecConfig", "make_codec"]
