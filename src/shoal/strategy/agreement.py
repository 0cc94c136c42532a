"""The vector that all ranks sum so that they decide alike: what it holds, and how often it leaves.

[loss, votes to stop, votes to turn to the next view, newcomers without state, a flag a rank, seconds a rank], float64.
Where ranks wait for each other in every step it leaves in every step; otherwise every so often, in the background.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from shoal.strategy.bucket import Bucket
from shoal.wire.transport import Memory

LOSS, STOP, TURN, COLD, HEAD = 0, 1, 2, 3, 4
"""The places of the loss and of the votes, and of the first rank's flag; seconds stand behind all flags."""
EVERY = 8
"""Steps between two agreements in the background, and between an agreement's leaving and its being read."""


def agreement_bucket(world_size: int, allocate: Callable[[int, torch.dtype], Memory]) -> Bucket:
    """Memory for the vector."""
    size = HEAD + 2 * world_size
    return Bucket.over("agreement", allocate(size, torch.float64), size)


def num_agreements(steps: int) -> int:
    """How many leave in the background in so many steps: in the first, and then every `EVERY`."""
    return -(-steps // EVERY)
