"""Several tensors' memory taken as one run of bytes, and cut into the pieces that travel between ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_PIECE_BYTES = 4 << 20


def pieces_of(total: int, index: int, count: int) -> Iterator[range]:
    """The ranges of bytes that giver `index` of `count` sends, in order."""
    start, end = total * index // count, total * (index + 1) // count
    for first in range(start, end, _PIECE_BYTES):
        yield range(first, min(first + _PIECE_BYTES, end))


def copy_range(memories: Sequence[Tensor], piece: range, message: Tensor, *, into: bool) -> None:
    """Copy a range of the memories' bytes, taken as one, to a message's beginning, or back."""
    start = 0
    for memory in memories:
        first, last = max(piece.start - start, 0), min(piece.stop - start, len(memory))
        if first < last:
            there = message[start + first - piece.start : start + last - piece.start]
            memory[first:last].copy_(there) if into else there.copy_(memory[first:last])
        start += len(memory)
        if start >= piece.stop:
            return


def bytes_of(tensor: Tensor) -> Tensor:
    """A tensor's memory as bytes, shape (n,); a copy if it is not contiguous."""
    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8) if flat.numel() else torch.empty(0, dtype=torch.uint8)
