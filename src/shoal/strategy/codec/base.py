"""What a codec is: how values look on the wire.

Every codec turns rows of values into bytes and back; the bytes describe themselves, so a receiver needs nothing else. A
*linear* codec can do more: it projects values so that the projections may be summed by the transport as they are, in
one round or several (random-k, PowerSGD). One that is not linear is decoded, summed in full precision and encoded
again (see sync/summation.py).

Codecs keep no state. What must be remembered between steps (a residual, a subspace) lies in the caller's hands, by
name: see feedback.py. All of them run on any device, `meta` included, where they compute nothing but shapes: that is
how bytes are predicted without a run.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Protocol, runtime_checkable

import pydantic
from torch import Tensor

from shoal.strategy.bucket import Piece
from shoal.strict_toml import STRICT

Projection = Generator[Tensor, None, tuple[Tensor, Tensor]]
"""Yields tensors to be summed over the group in place; returns (the sum, this rank's own part of it)."""


@dataclass(frozen=True, kw_only=True)
class CodecOptions:
    """What every codec's table takes beside its own.

    Attributes:
        warmup_steps: the first so many exchanges of each bucket go uncompressed.
        error_feedback: keep what the codec lost and add it to the next values; default: where the codec is biased.
        variance_every: for Adam and AdamW under all-reduce: exchange compressed momentum, and learn the second moment
            in every so many steps, whose gradients go as int8 (after 0/1 Adam, Lu et al. 2022); 0 compresses gradients.
    """

    __pydantic_config__: ClassVar = STRICT
    warmup_steps: Annotated[int, pydantic.Field(ge=0)] = 0
    error_feedback: bool | None = None
    variance_every: Annotated[int, pydantic.Field(ge=0)] = 0

    def compresses(self, count: int) -> bool:
        """Whether the codec acts on exchange number `count` of a bucket, from 1."""
        first = max(self.warmup_steps, 1 if self.variance_every else 0)
        return count > first and not (self.variance_every and count % self.variance_every == 0)

    def learns(self, count: int) -> bool:
        """Whether that exchange is one for the second moment, after the warm-up."""
        return bool(self.variance_every) and count > self.warmup_steps and not self.compresses(count)


class Codec(Protocol):
    """Encodes rows of values.

    Attributes:
        linear: `project` may be used where a sum is wanted.
        biased: the decoded values are not, on average, the encoded ones: error feedback is on by default.
    """

    linear: ClassVar[bool]
    biased: ClassVar[bool]

    def __init__(self, config: Any) -> None:
        """`config`: the codec's own table of the plan."""

    def encode(self, values: Tensor, key: int) -> Tensor:
        """Turn values, shape (rows, n), into bytes: uint8, shape (rows, size_bytes(n, values' item size)).

        Args:
            key: seeds what is drawn at random; the same values and key give the same bytes.
        """

    def decode(self, payload: Tensor, num_values: int, like: Tensor) -> Tensor:
        """Turn bytes, shape (rows, b), back into values, shape (rows, num_values), dtype and device of `like`."""

    def size_bytes(self, num_values: int, item_bytes: int) -> int:
        """The bytes that one row of `num_values` values of `item_bytes` each takes on the wire."""


@runtime_checkable
class EchoingCodec(Codec, Protocol):
    """A codec that knows cheaply, while it encodes, what will be decoded; error feedback then saves a decoding."""

    def encode_decoded(self, values: Tensor, key: int) -> tuple[Tensor, Tensor]:
        """The bytes, as by `encode`, and what they decode to, to the bit: shape and dtype of `values`."""


class LinearCodec(Codec, Protocol):
    """A codec whose projections may be summed."""

    def project(self, values: Tensor, pieces: Sequence[Piece], memory: dict[str, Tensor], key: int) -> Projection:
        """Sum over a group what the codec keeps of `values`, shape (n,).

        Args:
            pieces: the parameters that the values belong to.
            memory: this bucket's own between steps; the codec may put tensors into it.
            key: the same on every rank.
        """
