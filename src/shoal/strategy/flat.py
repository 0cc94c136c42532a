"""Which parameters lie together in flat memory and where: the same for who trains with them and who prices them.

A layout is a pure function of the parameters' names, shapes and dtypes, in the model's order, so it is the same on
every rank and in every run. Tensors on the device `meta` do as well as real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from shoal.strategy.bucket import Bucket, Piece
from shoal.wire.transport import Memory

T = TypeVar("T", bound=Tensor)

_ALIGNMENT_BYTES = 64
_BYTES_PER_MB = 1_000_000


@dataclass(frozen=True)
class Flat(Generic[T]):
    """Parameters of one dtype, side by side.

    Attributes:
        name: of the bucket that carries them.
        named: the parameters with their names; at least one.
        pieces: where each lies.
        num_values: places in all, with the gaps that keep each parameter aligned.
    """

    name: str
    named: tuple[tuple[str, T], ...]
    pieces: tuple[Piece, ...]
    num_values: int

    @property
    def parameters(self) -> tuple[T, ...]:
        """Without their names."""
        return tuple(parameter for _, parameter in self.named)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all of them."""
        return self.named[0][1].dtype

    def bucket(self, allocate: Callable[[int, torch.dtype], Memory], *, flags: bool) -> Bucket:
        """Memory for the values, and with `flags` for one flag a parameter and one for all."""
        memory = allocate(self.num_values + (len(self.named) + 1 if flags else 0), self.dtype)
        return Bucket.over(self.name, memory, self.num_values, self.pieces)


def bucket_bytes(bucket_mb: float) -> int:
    """The size at which a bucket is closed, from a plan's `bucket_mb`."""
    return int(bucket_mb * _BYTES_PER_MB)


def gradient_buckets(trainable: Sequence[tuple[str, T]], size_bytes: float) -> list[Flat[T]]:
    """The buckets of all gradients: the parameters' order backwards, since the last layers' gradients come first."""
    groups = _group(trainable[::-1], size_bytes)
    return [_lay_out(f"bucket-{index}", group) for index, group in enumerate(groups)]


def fragments(trainable: Sequence[tuple[str, T]], num_fragments: int, size_bytes: float) -> list[list[Flat[T]]]:
    """For each fragment its sections, in the model's order.

    Fragments are about equal in bytes, and as many as asked for unless there are fewer parameters; a section is closed
    at `size_bytes`.
    """
    return [
        [_lay_out(f"fragment-{index}/{place}", group) for place, group in enumerate(_group(fragment, size_bytes))]
        for index, fragment in enumerate(_divide(trainable, num_fragments))
    ]


def _lay_out(name: str, group: Sequence[tuple[str, T]]) -> Flat[T]:
    starts, num_values = _offsets([p.numel() for _, p in group], group[0][1].element_size())
    pieces = tuple(Piece(start, p.shape) for start, (_, p) in zip(starts, group, strict=True))
    return Flat(name, tuple(group), pieces, num_values)


def _group(parameters: Sequence[tuple[str, T]], size_bytes: float) -> list[list[tuple[str, T]]]:
    """Cut the list where a bucket holds `size_bytes` or the dtype changes."""
    groups: list[list[tuple[str, T]]] = []
    size = 0
    for name, parameter in parameters:
        if not groups or size >= size_bytes or groups[-1][-1][1].dtype != parameter.dtype:
            groups.append([])
            size = 0
        groups[-1].append((name, parameter))
        size += _bytes(parameter)
    return groups


def _divide(parameters: Sequence[tuple[str, T]], num_fragments: int) -> list[list[tuple[str, T]]]:
    """Cut a list of parameters into consecutive fragments of about equal bytes, none empty."""
    left, wanted = sum(_bytes(p) for _, p in parameters), min(num_fragments, len(parameters))
    divided: list[list[tuple[str, T]]] = [[]]
    size = 0
    for index, (name, parameter) in enumerate(parameters):
        to_come = wanted - len(divided)
        full = size + _bytes(parameter) / 2 > left / (to_come + 1)
        if divided[-1] and to_come and (full or len(parameters) - index == to_come):
            left, size = left - size, 0
            divided.append([])
        divided[-1].append((name, parameter))
        size += _bytes(parameter)
    return divided


def _offsets(sizes: Sequence[int], item_bytes: int) -> tuple[list[int], int]:
    """Where each of so many values starts, aligned for vector instructions, and the total."""
    unit = max(1, _ALIGNMENT_BYTES // item_bytes)
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += -(-size // unit) * unit
    return starts, end


def _bytes(parameter: Tensor) -> int:
    return parameter.numel() * parameter.element_size()
