"""A bucket: the piece of a gradient, or of a model, that is exchanged at once."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from shoal.wire.transport import Memory


@dataclass(frozen=True)
class Piece:
    """One parameter's place in a bucket: its values begin at `offset` and are as many as its shape says."""

    offset: int
    shape: torch.Size


@dataclass(frozen=True)
class Bucket:
    """Flat memory of one dtype: values, then one flag a parameter (above 0: it has a gradient somewhere), and one for
    all (above 0: some rank could not compute its part).

    Flags ride with the values they belong to, but no codec touches them.

    Attributes:
        name: the same on every rank and for the whole run.
        num_values: how many of the n places are values; the rest are flags.
        source: what this rank contributes, shape (n,).
        target: where the sums appear, shape (n,); the same memory as `source` unless ranks of one node share
            memory. It is valid from the end of the exchange until the next step's fence.
        portion: the slice of `target`'s values that this rank, and no other, may write after the exchange: all of them
            where the memory is this rank's own.
        pieces: the parameters that the values belong to.
    """

    name: str
    num_values: int
    source: Tensor
    target: Tensor
    portion: slice
    pieces: tuple[Piece, ...] = ()

    @functools.cached_property
    def gaps(self) -> tuple[slice, ...]:
        """Places among the values that belong to no parameter: they are kept at zero."""
        starts = [piece.offset for piece in self.pieces] + [self.num_values]
        ends = [0] + [piece.offset + piece.shape.numel() for piece in self.pieces]
        return tuple(slice(end, start) for end, start in zip(ends, starts, strict=True) if self.pieces and end < start)

    @classmethod
    def over(cls, name: str, memory: Memory, num_values: int, pieces: tuple[Piece, ...] = ()) -> Self:
        """A bucket of `num_values` values, and as many flags as `memory` has room for."""
        first, last = (min(bound, num_values) for bound in (memory.portion.start, memory.portion.stop))
        return cls(name, num_values, memory.source, memory.target, slice(first, last), pieces)
