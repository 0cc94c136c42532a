"""Random numbers as a pure function of (key, position): the same on every rank, device and machine.

A counter goes through an integer hash (Wellons' lowbias32, 2018), so nothing keeps a state and `meta` tensors work too.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN, _FIRST, _SECOND = -0x61C88647, 0x7FEB352D, -0x7B935975  # odd constants, as signed 32-bit integers
DRAW_BITS = 24


def draw(keys: Tensor, num_positions: int) -> Tensor:
    """Integers below 2**24, uniform: int32, shape (rows, num_positions), from keys, int64, shape (rows, 1)."""
    counter = torch.arange(num_positions, dtype=torch.int32, device=keys.device).mul_(_GOLDEN)
    x = counter + keys.to(torch.int32)
    _mix(x, 16, _FIRST)
    x ^= (keys >> 32).to(torch.int32)
    _mix(x, 15, _SECOND)
    _mix(x, 16, _FIRST)
    return x.bitwise_right_shift_(32 - DRAW_BITS).bitwise_and_((1 << DRAW_BITS) - 1)


def uniform(key: int, shape: torch.Size, like: Tensor) -> Tensor:
    """Numbers in [0, 1), of the dtype and device of `like`."""
    keys = torch.full((1, 1), key, dtype=torch.int64, device=like.device)
    return draw(keys, shape.numel()).to(like.dtype).mul_(2.0**-DRAW_BITS).view(shape)


def _mix(x: Tensor, shift: int, factor: int) -> None:
    shifted = x >> shift
    x ^= shifted.bitwise_and_((1 << (32 - shift)) - 1)  # a signed shift draws copies of the sign in
    x *= factor
