"""All ranks in step: each takes its share of every global batch. The other way is `own_pace.py`'s."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Protocol

from shoal.data.loader import Batch, Loader
from shoal.engine.exchange.agreement import Verdict
from shoal.engine.progress import Progress


class Steps(Protocol):
    """What a pace needs of the loop."""

    progress: Progress

    def take(self, batch: Batch, reached: Progress, clock: int) -> Verdict:
        """Train one step; return what the ranks agreed on."""

    def wants_to_stop(self) -> bool:
        """Whether this rank asks to stop."""

    def settle(self) -> None:
        """Wait until everything that this rank has told others is known to them."""


class InStep:
    """Every rank in every step."""

    def __init__(self, loader: Loader, start: Progress) -> None:
        self._loader = loader
        self._batches: Iterator[Batch] = loader.batches(start.cursor)

    def divide(self, shares: tuple[float, ...], start: Progress) -> None:
        """From `start` on, divide batches by `shares`."""
        self._batches = self._loader.divided(shares).batches(start.cursor)

    def round(self, loop: Steps) -> Verdict:
        """One step."""
        batch, before = next(self._batches), loop.progress
        reached = dataclasses.replace(
            before, step=before.step + 1, cursor=batch.after, samples=before.samples + batch.size
        )
        return loop.take(batch, reached, before.step)
