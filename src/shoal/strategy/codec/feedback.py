"""Error feedback: what a codec loses now is added to what it gets next (Seide et al. 2014; Karimireddy et al. 2019).

One wrapper around any codec. It holds, by name, everything that has to survive from one exchange to the next:
residuals, a linear codec's own memory, and how many exchanges there have been, which seeds the codec and ends the
warm-up.
Over time nothing is lost: the sum of all decoded values and the residual is the sum of all values given.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shoal.strategy.bucket import Piece
from shoal.strategy.codec.base import Codec, CodecOptions, EchoingCodec, LinearCodec, Projection
from shoal.strategy.codec.momentum import Momentum

_RESIDUAL = "residual"


class Coder:
    """A codec as one rank uses it. Names are those of buckets and stages; each is used by one thread at a time."""

    def __init__(
        self, codec: Codec, options: CodecOptions, *, rank: int = 0, seed: int = 0, learning: Coder | None = None
    ) -> None:
        """`learning`: encodes gradients for Adam's second moment, where `options` ask for that; it keeps no state."""
        self.codec = codec
        self.learning = learning
        self.options = options
        self._feedback = codec.biased if options.error_feedback is None else options.error_feedback
        self._rank = rank
        self._seed = seed
        self._counts: dict[str, int] = {}
        self._memory: dict[str, dict[str, Tensor]] = {}
        self.momenta: dict[str, Momentum] = {}
        """By bucket: what to exchange in place of gradients where the codec works with Adam. Not part of the state."""

    def begin(self, name: str) -> bool:
        """Begin an exchange of the bucket `name`; return whether to compress."""
        self._counts[name] = self._counts.get(name, 0) + 1
        return self.compresses(name)

    def choose(self, name: str) -> Coder | None:
        """Begin an exchange of the bucket `name`; return who encodes it; None if it goes as it is."""
        if self.begin(name):
            return self
        return self.learning if self.options.learns(self._counts[name]) else None

    def compresses(self, name: str) -> bool:
        """Whether the exchange of the bucket `name` that was begun last is compressed."""
        return self.options.compresses(self._counts.get(name, 0))

    def encode(self, name: str, values: Tensor, *, stage: str = "own") -> Tensor:
        """Encode rows of values, shape (rows, n), with what was lost before; remember what is lost now."""
        key = f"{name}/{stage}"
        seed = self._key(name, self._rank + 1, stage)
        if not self._feedback:
            return self.codec.encode(values, seed)
        corrected = self._corrected(key, values)
        if isinstance(self.codec, EchoingCodec):
            payload, decoded = self.codec.encode_decoded(corrected, seed)
        else:
            payload = self.codec.encode(corrected, seed)
            decoded = self.codec.decode(payload, values.shape[-1], corrected)
        corrected.sub_(decoded)
        return payload

    def decode(self, payload: Tensor, num_values: int, like: Tensor) -> Tensor:
        """The codec's own decoding."""
        return self.codec.decode(payload, num_values, like)

    def project(self, name: str, values: Tensor, pieces: Sequence[Piece]) -> Projection:
        """A linear codec's sum of values, shape (n,), with what was lost before; remember what is lost now."""
        codec: LinearCodec = self.codec  # type: ignore[assignment]
        key = f"{name}/own"
        corrected = self._corrected(key, values) if self._feedback else values
        memory = self._memory.setdefault(f"{name}/codec", {})
        total, own = yield from codec.project(corrected, pieces, memory, self._key(name, 0, ""))
        if self._feedback:
            corrected.sub_(own)
        return total, own

    def residual_norm(self) -> float:
        """The 2-norm of everything that waits to be sent."""
        squares = [m[_RESIDUAL].double().square().sum() for m in self._memory.values() if _RESIDUAL in m]
        return float(torch.stack(squares).sum().sqrt()) if squares else 0.0

    def state_dict(self) -> dict[str, Any]:
        """All that must survive a restart; the tensors are this object's own."""
        return {"counts": dict(self._counts), "memory": {name: dict(held) for name, held in self._memory.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`'s value."""
        self._counts = dict(state["counts"])
        self._memory = {name: {key: t.clone() for key, t in held.items()} for name, held in state["memory"].items()}

    def reset(self) -> None:
        """Forget all residuals and memories, as after a change of membership; counts go on."""
        self._memory.clear()

    def _corrected(self, key: str, values: Tensor) -> Tensor:
        """The values and what was lost before, in the residual's own memory: the caller takes off what is decoded."""
        memory = self._memory.setdefault(key, {})
        held = memory.get(_RESIDUAL)
        if held is None:
            memory[_RESIDUAL] = values.clone(memory_format=torch.contiguous_format)
        else:
            held.add_(values)
        return memory[_RESIDUAL]

    def _key(self, name: str, sender: int, stage: str) -> int:
        """63 bits that differ by run, bucket, exchange, sender and stage."""
        text = f"{self._seed}/{name}/{self._counts.get(name, 0)}/{sender}/{stage}".encode()
        return zlib.crc32(text) << 31 | zlib.crc32(text[::-1]) >> 1
