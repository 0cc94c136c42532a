"""How a batch is divided: over ranks by share, over micro-batches evenly. Pure functions of whole numbers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def divide(total: int, weights: Sequence[float]) -> list[int]:
    """Divide `total` items in proportion to `weights`, by largest remainder (Hamilton's method).

    Returns:
        One count a weight; they sum to `total`, and each is within one of its exact share. Ties go to the first.
    """
    whole = sum(weights)
    exact = [total * weight / whole for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: (counts[i] - exact[i], i))
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def spans(total: int, weights: Sequence[float]) -> list[range]:
    """Divide 0 .. total - 1 into consecutive ranges, sized by `divide`."""
    bounds = [0]
    for count in divide(total, weights):
        bounds.append(bounds[-1] + count)
    return [range(start, end) for start, end in itertools.pairwise(bounds)]


def steps_per_epoch(num_samples: int, batch_size: int, *, drop_last: bool) -> int:
    """The number of optimizer steps in which each sample is seen once (the last may be smaller)."""
    return num_samples // batch_size if drop_last else -(-num_samples // batch_size)
