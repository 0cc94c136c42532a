"""What a codec is: how values look on the wire.

A codec turns flat tensors into bytes and back. `linear` says that encoded values may be summed as they are by the
transport; a codec that is not linear is decoded, summed in full precision and encoded again (see sync/allreduce.py).
Error feedback is not a codec's business.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Codec(Protocol):
    """Encodes rows of values; stateless, so that one object serves every bucket."""

    linear: bool

    def encode(self, values: Tensor) -> Tensor:
        """Turn values, shape (rows, n), into bytes: uint8, shape (rows, size_bytes(n, values' item size))."""

    def decode(self, payload: Tensor, like: Tensor) -> Tensor:
        """Turn bytes, shape (rows, b), back into values, shape (rows, n), with the dtype of `like`."""

    def size_bytes(self, num_values: int, item_bytes: int) -> int:
        """The bytes that one row of `num_values` values takes on the wire."""
