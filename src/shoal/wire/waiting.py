"""Waiting for another thread, with an eye on whether it can still come to an end."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from shoal.errors import PeerLostError

LOOK_S = 0.25
"""How often who waits looks up."""

T = TypeVar("T")


def result_unless(future: Future[T], is_stuck: Callable[[], bool]) -> T:
    """The future's result.

    Raises:
        PeerLostError: it has none, and will never have.
    """
    while True:
        try:
            return future.result(LOOK_S)
        except TimeoutError:  # ours, or the future's own
            if future.done():
                return future.result()
        if is_stuck():
            raise PeerLostError("an exchange waits for a message that will never be whole")
