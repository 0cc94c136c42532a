"""Large blocks of memory stay with the process once they are there.

ZeroMQ allocates the memory of every message anew, codecs and backward that of their results. glibc gives large blocks
back to the system at once, so each would pay for fresh pages again: on loopback that halves ZeroMQ's rate
(docs/performance.md), and it costs a step with a codec about a twentieth.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_LARGEST_BLOCK = 32 * 1024 * 1024  # glibc's own limit for blocks from its heap
_KEEP_BYTES = 1 << 30
_SMALL_BLOCK, _KEEP_LITTLE_BYTES = 1 << 20, 1 << 25
_AHEAD_BYTES = 64 * 1024 * 1024  # of address space; pages come when they are touched


def keep_large_blocks() -> None:
    """Let this process's malloc reuse blocks of up to 32 MiB, and hold on to up to 1 GiB that is free.

    For the whole process, from now on; on systems without glibc it does nothing.
    """
    _set_malloc(_LARGEST_BLOCK, _KEEP_BYTES)


def return_large_blocks() -> None:
    """Let malloc give blocks of more than 1 MiB back as soon as they are free: for what hardly fits into memory."""
    _set_malloc(_SMALL_BLOCK, _KEEP_LITTLE_BYTES)


def _set_malloc(largest_block: int, keep_bytes: int) -> None:
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, largest_block)
        mallopt(_M_TRIM_THRESHOLD, keep_bytes)
        mallopt(_M_TOP_PAD, _AHEAD_BYTES)
