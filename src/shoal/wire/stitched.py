"""Memory that several processes see, stitched together page by page.

Every rank of a node owns one anonymous file in memory (`memfd_create`: it has no name, so nothing can be left behind,
and the size of /dev/shm does not bound it). With w ranks, a file is cut into w equal slices of whole pages. The
*stitched* view maps slice 0 of rank 0's file, then slice 1 of rank 1's, and so on, as one contiguous array:

    rank 0's file  [ 0 |   |   ]          each rank sums slice r of all files into slice r of its own;
    rank 1's file  [   | 1 |   ]          the stitched view [ 0 | 1 | 2 ] then is the whole sum,
    rank 2's file  [   |   | 2 ]          for every rank, and nobody has copied anything

Linux only: other systems lack memfd or MAP_FIXED over files from Python.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

_PROT_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_MAP_FIXED = 0x10
_MAP_FAILED = ctypes.c_void_p(-1).value


def available() -> bool:
    """Whether this system can stitch memory."""
    return sys.platform == "linux" and hasattr(os, "memfd_create")


def slice_bytes(size_bytes: int, num_slices: int) -> int:
    """The size of one slice: whole pages, `num_slices` of which hold at least `size_bytes`."""
    pages = -(-max(size_bytes, 1) // (mmap.PAGESIZE * num_slices))
    return pages * mmap.PAGESIZE


def create_file(size_bytes: int) -> int:
    """Make an anonymous zeroed file in memory and return its descriptor, which the caller closes."""
    descriptor = os.memfd_create("shoal-gradients", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, size_bytes)
    return descriptor


class StitchedMemory:
    """The mappings of all ranks' files in this process. `close` unmaps: no tensor may be used after it."""

    def __init__(self, descriptors: Sequence[int], slice_size_bytes: int) -> None:
        """Map the files of all ranks, in order of rank; the descriptors may be closed afterwards."""
        self._mappings: list[tuple[int, int]] = []
        self._slice_bytes = slice_size_bytes
        self._total_bytes = slice_size_bytes * len(descriptors)
        self._files = [self._map(descriptor, self._total_bytes, 0) for descriptor in descriptors]
        self._stitched = self._map(-1, self._total_bytes, 0)
        for index, descriptor in enumerate(descriptors):
            offset = index * slice_size_bytes
            self._map(descriptor, slice_size_bytes, offset, at=self._stitched + offset)

    def file(self, index: int, num_values: int, dtype: torch.dtype) -> Tensor:
        """Rank `index`'s own file as values, shape (num_values,)."""
        return _tensor_at(self._files[index], num_values, dtype)

    def stitched(self, num_values: int, dtype: torch.dtype) -> Tensor:
        """The stitched view as values, shape (num_values,)."""
        return _tensor_at(self._stitched, num_values, dtype)

    def close(self) -> None:
        """Unmap everything."""
        for address, size in self._mappings:
            _libc().munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
        self._mappings.clear()

    def _map(self, descriptor: int, size_bytes: int, offset: int, at: int | None = None) -> int:
        flags = mmap.MAP_SHARED if descriptor >= 0 else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        if at is not None:
            flags |= _MAP_FIXED
        address = _libc().mmap(at, size_bytes, _PROT_READ_WRITE, flags, descriptor, offset)
        if address is None or address == _MAP_FAILED:
            code = ctypes.get_errno()
            raise OSError(code, f"cannot map {size_bytes} bytes of shared memory: {os.strerror(code)}")
        if at is None:
            self._mappings.append((address, size_bytes))
        return int(address)


def _tensor_at(address: int, num_values: int, dtype: torch.dtype) -> Tensor:
    if num_values == 0:
        return torch.empty(0, dtype=dtype)
    raw = (ctypes.c_byte * (num_values * dtype.itemsize)).from_address(address)
    return torch.frombuffer(raw, dtype=dtype)


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    ]
    return libc
