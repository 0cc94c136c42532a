"""Running out of memory: how it shows, and how what a failed step holds is given back."""

from __future__ import annotations

import gc

import torch

_CPU_ALLOCATOR = "can't allocate memory"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the machine, or its GPU, has no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or _CPU_ALLOCATOR in str(error)


def give_back() -> None:
    """Free what nobody refers to any more, cycles and the GPU's cache included."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
