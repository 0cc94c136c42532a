"""Keeps Python's garbage collector from halting training."""

from __future__ import annotations

import gc
from collections.abc import Callable


def spare_what_lasts() -> None:
    """Let the garbage collector pass over everything that is there now.

    PyTorch's modules alone are a million objects. To look through all of them takes a quarter of a second, in which a
    rank stands still and all others wait for it.
    """
    gc.collect()
    gc.freeze()


def let_go(close: Callable[[], None]) -> None:
    """Close what a view leaves behind, and collect it: its parts refer to each other, and sockets end with them."""
    close()
    gc.collect()
