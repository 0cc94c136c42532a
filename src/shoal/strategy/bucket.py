"""A bucket: the piece of the gradient that is exchanged at once."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Bucket:
    """Flat memory of one dtype.

    Attributes:
        name: the same on every rank and for the whole run.
        source: what this rank contributes, shape (n,).
        target: where the reduced values appear, shape (n,); the same memory as `source` unless ranks of one node share
            memory. It is valid from the end of the exchange until the next step's fence.
        portion: the slice of `target` that this rank, and no other, may write after the exchange: all of it where the
            memory is this rank's own.
    """

    name: str
    source: Tensor
    target: Tensor
    portion: slice
