"""Codecs: what goes on the wire. One file each; CODECS is the family's table."""

from __future__ import annotations

from typing import Annotated

import pydantic

from shoal.strategy.codec.base import Codec
from shoal.strategy.codec.bf16 import Bf16Codec, Bf16Config
from shoal.strategy.codec.fp16 import Fp16Codec, Fp16Config
from shoal.strategy.codec.int2 import Int2Codec, Int2Config
from shoal.strategy.codec.int4 import Int4Codec, Int4Config
from shoal.strategy.codec.int8 import Int8Codec, Int8Config
from shoal.strategy.codec.none import NoneCodec, NoneConfig
from shoal.strategy.codec.onebit import OneBitCodec, OneBitConfig
from shoal.strategy.codec.powersgd import PowerSgdCodec, PowerSgdConfig
from shoal.strategy.codec.qsgd import QsgdCodec, QsgdConfig
from shoal.strategy.codec.randomk import RandomKCodec, RandomKConfig
from shoal.strategy.codec.sign import SignCodec, SignConfig
from shoal.strategy.codec.terngrad import TernGradCodec, TernGradConfig
from shoal.strategy.codec.topk import TopKCodec, TopKConfig

CodecConfig = Annotated[
    NoneConfig
    | Bf16Config
    | Fp16Config
    | Int8Config
    | Int4Config
    | Int2Config
    | SignConfig
    | OneBitConfig
    | TernGradConfig
    | QsgdConfig
    | TopKConfig
    | RandomKConfig
    | PowerSgdConfig,
    pydantic.Field(discriminator="kind"),
]

CODECS: dict[str, type[Codec]] = {
    "none": NoneCodec,
    "bf16": Bf16Codec,
    "fp16": Fp16Codec,
    "int8": Int8Codec,
    "int4": Int4Codec,
    "int2": Int2Codec,
    "sign": SignCodec,
    "onebit": OneBitCodec,
    "terngrad": TernGradCodec,
    "qsgd": QsgdCodec,
    "topk": TopKCodec,
    "randomk": RandomKCodec,
    "powersgd": PowerSgdCodec,
}


def make_codec(config: CodecConfig) -> Codec:
    """The codec that a table of the plan describes."""
    return CODECS[config.kind](config)


__all__ = ["CODECS", "Codec", "CodecConfig", "make_codec"]
