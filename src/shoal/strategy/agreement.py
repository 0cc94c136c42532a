"""The vector that all ranks sum so that they decide alike: what it holds, and how often it leaves.

[loss, votes to stop, votes to turn to the next view, newcomers without state, wishes for a checkpoint], then rows of
one number a rank: a flag, seconds for data, seconds of computing. All are float64. Where ranks wait for each other in
every step it leaves in every step; otherwise every so often, in the background.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from shoal.strategy.bucket import Bucket
from shoal.wire.transport import Memory

LOSS, STOP, TURN, COLD, SAVE, HEAD = range(6)
"""The places of the loss and of the votes, and of the first row."""
FLAG, DATA_S, COMPUTE_S, NUM_ROWS = range(4)
"""The rows, and how many there are."""
EVERY = 8
"""Steps between two agreements in the background, and between an agreement's leaving and its being read."""


def row(index: int, world_size: int) -> slice:
    """The places of a row: rank r's is the r-th."""
    start = HEAD + index * world_size
    return slice(start, start + world_size)


def agreement_bucket(world_size: int, allocate: Callable[[int, torch.dtype], Memory]) -> Bucket:
    """Memory for the vector."""
    size = HEAD + NUM_ROWS * world_size
    return Bucket.over("agreement", allocate(size, torch.float64), size)


def num_agreements(steps: int) -> int:
    """How many leave in the background in so many steps: in the first, and then every `EVERY`."""
    return -(-steps // EVERY)
