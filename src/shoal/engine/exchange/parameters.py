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
from shoal.strategy.bucket import Piece


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


def lay_out(model: nn.Module, num_fragments: int, bucket_bytes: float) -> list[list[Section]]:
    """Move a model's trainable parameters into flat memory.

    Returns:
        For each fragment its sections, in the model's order. Fragments are about equal in bytes, and as many as asked
        for unless there are fewer parameters; a section is closed at `bucket_bytes`.
    """
    parameters = flat.trainable(model)
    fragments = _divide(parameters, num_fragments)
    laid: list[list[Section]] = []
    for index, fragment in enumerate(fragments):
        groups = flat.group(fragment, bucket_bytes)
        laid.append([_lay_out(f"fragment-{index}/{place}", members) for place, members in enumerate(groups)])
    return laid


@contextmanager
def holding(sections: Sequence[Section], memories: Sequence[Tensor]) -> Iterator[None]:
    """While it lasts the parameters show `memories` in place of the sections' own values; nothing is copied."""
    _point(sections, memories)
    try:
        yield
    finally:
        _point(sections, [section.values for section in sections])


def _point(sections: Sequence[Section], memories: Sequence[Tensor]) -> None:
    for section, memory in zip(sections, memories, strict=True):
        for parameter, view in zip(section.parameters, section.views(memory), strict=True):
            parameter.data = view


def _lay_out(name: str, members: Sequence[flat.NamedParameter]) -> Section:
    first = members[0][1]
    starts, total = flat.offsets([p.numel() for _, p in members], first.element_size())
    values = torch.zeros(total, dtype=first.dtype, device=first.device)
    pieces = tuple(Piece(start, p.shape) for start, (_, p) in zip(starts, members, strict=True))
    section = Section(name, values, pieces, tuple(p for _, p in members), tuple(n for n, _ in members))
    for parameter, view in zip(section.parameters, section.views(values), strict=True):
        view.copy_(parameter.detach())
        parameter.data = view
    return section


def _divide(parameters: Sequence[flat.NamedParameter], num_fragments: int) -> list[list[flat.NamedParameter]]:
    """Cut a list of parameters into consecutive fragments of about equal bytes, none empty."""
    left, fragments = sum(flat.size_bytes(p) for _, p in parameters), min(num_fragments, len(parameters))
    divided: list[list[flat.NamedParameter]] = [[]]
    size = 0
    for index, (name, parameter) in enumerate(parameters):
        wanted = fragments - len(divided)  # fragments still to come
        full = size + flat.size_bytes(parameter) / 2 > left / (wanted + 1)
        if divided[-1] and wanted and (full or len(parameters) - index == wanted):
            left, size = left - size, 0
            divided.append([])
        divided[-1].append((name, parameter))
        size += flat.size_bytes(parameter)
    return divided
