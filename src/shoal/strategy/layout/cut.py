"""Cuts a chain of layers into stages: none empty, and the heaviest as light as possible."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Weight:
    """What one layer takes: seconds of forward and backward, bytes while training."""

    seconds: float
    size_bytes: float


def cut(weights: Sequence[Weight], num_stages: int) -> list[range]:
    """Cut into consecutive stages; a stage's load is its part of all time or of all memory, whichever is more.

    Minimizes the largest load, by dynamic programming in O(stages * layers^2); of equal cuts the first layers get more.

    Raises:
        ValueError: there are fewer layers than stages.
    """
    count = len(weights)
    if count < num_stages:
        raise ValueError(f"{count} layers cannot make {num_stages} stages")
    times, sizes = (_sums([getattr(w, name) for w in weights]) for name in ("seconds", "size_bytes"))

    def load(start: int, stop: int) -> float:
        return max(times[stop] - times[start], sizes[stop] - sizes[start])

    # best[stop]: (the heaviest load, where the last stage starts) for the first `stop` layers in so many stages.
    table = [[(load(0, stop), 0) for stop in range(count + 1)]]
    for stages in range(2, num_stages + 1):
        before = table[-1]
        table.append(
            [
                min(
                    ((max(before[start][0], load(start, stop)), start) for start in range(stages - 1, stop)),
                    default=(float("inf"), 0),
                )
                for stop in range(count + 1)
            ]
        )
    bounds = [count]
    for row in reversed(table[1:]):
        bounds.append(row[bounds[-1]][1])
    return [range(start, stop) for start, stop in itertools.pairwise([0, *reversed(bounds)])]


def _sums(values: Sequence[float]) -> list[float]:
    """Parts of the whole, summed from the left; zeros where there is nothing."""
    total = sum(values) or 1.0
    return [0.0, *itertools.accumulate(value / total for value in values)]
