"""CRC-32 of a tensor's bytes, a tensor that travels beside it: TCP's 16 bits miss one damaged packet in 65,536."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from shoal.errors import PeerLostError

NUM_BYTES = 8


def checksum(content: Tensor) -> Tensor:
    """Of a contiguous CPU tensor; shape (NUM_BYTES,) of uint8."""
    flat = content.detach().reshape(-1)
    value = zlib.crc32(flat.view(torch.uint8).numpy().data) if flat.numel() else 0
    return torch.frombuffer(bytearray(value.to_bytes(NUM_BYTES, "little")), dtype=torch.uint8)


def empty() -> Tensor:
    """Memory for one."""
    return torch.empty(NUM_BYTES, dtype=torch.uint8)


def check(content: Tensor, told: Tensor, what: str) -> None:
    """Compare.

    Raises:
        PeerLostError: `content` is not what was sent; it must not be used.
    """
    if not torch.equal(checksum(content), told):
        raise PeerLostError(f"{what} arrived damaged: its checksum differs; it was not used")
