"""Stitched memory shows each rank's slice where it belongs, in whole pages, and is gone when it is closed."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.wire import stitched

pytestmark = pytest.mark.skipif(not stitched.available(), reason="this system cannot stitch memory")


@contextmanager
def mapped(num_ranks: int, slice_size_bytes: int) -> Iterator[stitched.StitchedMemory]:
    descriptors = [stitched.create_file(slice_size_bytes * num_ranks) for _ in range(num_ranks)]
    memory = stitched.StitchedMemory(descriptors, slice_size_bytes)
    for descriptor in descriptors:
        os.close(descriptor)
    try:
        yield memory
    finally:
        memory.close()


def num_mappings() -> int:
    return Path("/proc/self/maps").read_text().count("shoal-gradients")


@given(st.integers(0, 10**8), st.integers(1, 64))
def test_a_slice_is_whole_pages_and_no_page_too_many(size_bytes: int, num_slices: int) -> None:
    size = stitched.slice_bytes(size_bytes, num_slices)
    assert size > 0
    assert size % mmap.PAGESIZE == 0
    assert size * num_slices >= size_bytes
    assert size == mmap.PAGESIZE or (size - mmap.PAGESIZE) * num_slices < size_bytes


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("num_pages", [1, 2, 7])
def test_slice_r_of_rank_rs_file_lands_at_place_r(num_ranks: int, num_pages: int) -> None:
    slice_bytes = num_pages * mmap.PAGESIZE
    per_slice = slice_bytes // 4
    total = per_slice * num_ranks
    with mapped(num_ranks, slice_bytes) as memory:
        for rank in range(num_ranks):
            memory.file(rank, total, torch.float32).copy_(torch.arange(total) + 1000.0 * rank)
        whole = memory.stitched(total, torch.float32)
        for rank in range(num_ranks):
            piece = slice(rank * per_slice, (rank + 1) * per_slice)
            assert torch.equal(whole[piece], torch.arange(total)[piece] + 1000.0 * rank)


def test_writing_into_the_whole_writes_into_each_owners_file_and_nowhere_else() -> None:
    per_slice = mmap.PAGESIZE // 8
    with mapped(3, mmap.PAGESIZE) as memory:
        memory.stitched(3 * per_slice, torch.float64).fill_(1.0)
        for rank in range(3):
            expected = torch.zeros(3, per_slice, dtype=torch.float64)
            expected[rank] = 1.0
            assert torch.equal(memory.file(rank, 3 * per_slice, torch.float64), expected.flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64])
def test_new_memory_is_zero_in_any_dtype(dtype: torch.dtype) -> None:
    with mapped(2, mmap.PAGESIZE) as memory:
        assert not memory.stitched(11, dtype).any()
        assert memory.file(1, 11, dtype).dtype == dtype


def test_no_values_take_no_memory() -> None:
    with mapped(2, mmap.PAGESIZE) as memory:
        assert memory.stitched(0, torch.float32).shape == (0,)
        assert memory.file(1, 0, torch.bfloat16).shape == (0,)


def test_closing_unmaps_everything_and_may_be_repeated() -> None:
    before = num_mappings()
    with mapped(3, mmap.PAGESIZE) as memory:
        assert num_mappings() > before
        memory.close()
        assert num_mappings() == before
    assert num_mappings() == before


def test_a_descriptor_that_is_no_file_is_an_error_and_not_a_crash() -> None:
    read, write = os.pipe()
    try:
        with pytest.raises(OSError, match="cannot map 4096 bytes of shared memory"):
            stitched.StitchedMemory([read], 4096)
    finally:
        os.close(read)
        os.close(write)
