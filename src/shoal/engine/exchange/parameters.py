"""A model's parameters as flat memory, for syncs that exchange parameters rather than gradients.

The parameters' own storage becomes a view of this memory, so that averaging, mixing and copying a whole part of the
model are single operations on one tensor. Shapes, strides and the `Parameter` objects stay what they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shoal.engine.exchange import flat
from shoal.engine.layout.replica import Replica
from shoal.strategy.bucket import Piece
from shoal.strategy.flat import Flat, fragments


@dataclass(frozen=True)
class Section:
    """Some parameters in one flat tensor, `values`, shape (n,)."""

    name: str
    values: Tensor
    pieces: tuple[Piece, ...]
    parameters: tuple[nn.Parameter, ...]
    names: tuple[str, ...]

    def views(self, memory: Tensor) -> list[Tensor]:
        """Views of `memory`, shape (n,), one for each parameter and shaped like it."""
        pairs = zip(self.parameters, self.pieces, strict=True)
        return [flat.view_like(p, memory, piece.offset) for p, piece in pairs]


def lay_out(replica: Replica, num_fragments: int, bucket_bytes: float) -> list[list[Section]]:
    """Move what a rank holds of a model's trainable parameters into flat memory.

    Returns:
        For each fragment its sections: see `strategy.flat.fragments`.
    """
    laid = fragments(replica.named_locals, num_fragments, bucket_bytes)
    return [[_take(section) for section in fragment] for fragment in laid]


@contextmanager
def holding(replica: Replica, sections: Sequence[Section], memories: Sequence[Tensor]) -> Iterator[None]:
    """While it lasts the parameters show `memories` in place of the sections' own values.

    Nothing is copied where this rank holds the whole model.
    """
    _point(sections, memories)
    replica.publish()
    try:
        yield
    finally:
        _point(sections, [section.values for section in sections])
        replica.publish()


def _point(sections: Sequence[Section], memories: Sequence[Tensor]) -> None:
    for section, memory in zip(sections, memories, strict=True):
        for parameter, view in zip(section.parameters, section.views(memory), strict=True):
            parameter.data = view


def _take(laid: Flat[nn.Parameter]) -> Section:
    first = laid.parameters[0]
    values = torch.zeros(laid.num_values, dtype=first.dtype, device=first.device)
    section = Section(laid.name, values, laid.pieces, laid.parameters, tuple(name for name, _ in laid.named))
    for parameter, view in zip(section.parameters, section.views(values), strict=True):
        view.copy_(parameter.detach())
        parameter.data = view
    return section
