"""Codes of 1, 2, 4 or 8 bits, packed into bytes.

Several codes are handled at once as the bytes of one wide integer, so that packing costs a pass or two over the codes,
not over the values. Little-endian machines are taken for granted, as they are by torch's own files.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GATHER_BITS = 0x0102040810204080  # moves the lowest bit of each of 8 bytes into the highest byte, the first one lowest


def section(payload: Tensor, start: int, stop: int | None, dtype: torch.dtype) -> Tensor:
    """Bytes `start` to `stop` of every row as numbers, shape (rows, length / item size): a copy, so aligned."""
    return payload[:, start:stop].clone(memory_format=torch.contiguous_format).view(dtype)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes, uint8 below 2**bits, contiguous, shape (..., n), n divisible by 8: uint8, shape (..., n * bits / 8).

    The first code takes a byte's lowest bits. The result may be the same memory.
    """
    if bits == 4:
        pairs = codes.view(torch.int16)
        return (pairs >> 4).bitwise_or_(pairs).to(torch.uint8)
    if bits == 2:
        fours = codes.view(torch.int32)
        eights = (fours >> 6).bitwise_or_(fours)
        return (eights >> 12).bitwise_or_(eights).to(torch.uint8)
    if bits == 1:
        return (codes.view(torch.int64) * _GATHER_BITS >> 56).to(torch.uint8)
    assert bits == 8, bits
    return codes


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The reverse: uint8, shape (..., b), to codes, uint8, shape (..., b * 8 / bits)."""
    if bits == 4:
        w = packed.to(torch.int16)
        w = (w << 4).bitwise_or_(w).bitwise_and_(0x0F0F)
    elif bits == 2:
        w = packed.to(torch.int32)
        w = (w << 12).bitwise_or_(w).bitwise_and_(0x000F000F)
        w = (w << 6).bitwise_or_(w).bitwise_and_(0x03030303)
    elif bits == 1:
        w = packed.to(torch.int64)
        w = (w << 28).bitwise_or_(w).bitwise_and_(0x0000000F0000000F)
        w = (w << 14).bitwise_or_(w).bitwise_and_(0x0003000300030003)
        w = (w << 7).bitwise_or_(w).bitwise_and_(0x0101010101010101)
    else:
        assert bits == 8, bits
        return packed
    return w.view(torch.uint8)
