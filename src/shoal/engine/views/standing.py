"""How far each rank of a view is, and who therefore gives the state to whom. Pure.

Where every rank has a replica of its own (gossip, local steps), whoever trained in the newest view keeps it, and is not
corrected; only those who come in take another's.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

NOTHING = -1
"""Committed steps of a rank that has no state."""


@dataclass(frozen=True)
class Standing:
    """How far a rank is: committed steps (-1: it has no state), the last step validated, what its parameters are, the
    view that it trained in last, and whether it is in the middle of a round (1) that began at that step.
    """

    step: int
    validated: int
    digest: int
    epoch: int = 0
    midway: int = 0


@dataclass(frozen=True)
class Roles:
    """Who gives and who takes. `teller`: one giver, which also knows of the latest validation; None: nobody has any
    state. `differing`: ranks that should hold what the givers hold, and do not.
    """

    teller: int | None
    givers: list[int]
    takers: list[int]
    differing: list[int]


def roles(standings: Sequence[Standing]) -> Roles:
    """Decide who hands over to whom: the most frequent parameters among those who have come furthest go to the rest."""
    furthest = max(standing.step for standing in standings)
    if furthest == NOTHING:
        return Roles(None, [], [], [])
    # Who took that step in an older view took it with other sums: only the newest view's counts.
    newest = max(standing.epoch for standing in standings if standing.step == furthest)
    ahead = [r for r, standing in enumerate(standings) if (standing.step, standing.epoch) == (furthest, newest)]
    counts = Counter(standings[rank].digest for rank in ahead)
    most = max(counts.values())
    digest = next(standings[rank].digest for rank in ahead if counts[standings[rank].digest] == most)
    givers = [rank for rank in ahead if standings[rank].digest == digest]
    teller = max(givers, key=lambda rank: (standings[rank].validated, -rank))
    takers = [rank for rank in range(len(standings)) if rank not in givers]
    return Roles(teller, givers, takers, [rank for rank in ahead if rank not in givers])


def roles_apart(standings: Sequence[Standing]) -> Roles:
    """The same for replicas that differ by design: one of those who have come furthest in the newest view gives."""
    epochs = [standing.epoch for standing in standings if standing.step != NOTHING]
    if not epochs:
        return Roles(None, [], [], [])
    keeping = [
        rank for rank, standing in enumerate(standings) if standing.step != NOTHING and standing.epoch == max(epochs)
    ]
    teller = max(
        keeping, key=lambda rank: (standings[rank].step, standings[rank].midway, standings[rank].validated, -rank)
    )
    return Roles(teller, [teller], [rank for rank in range(len(standings)) if rank not in keeping], [])


def digest_of(model: nn.Module) -> int:
    """The digest of a model's parameters."""
    return digest(parameter.detach() for parameter in model.parameters())


def digest(tensors: Iterable[Tensor]) -> int:
    """63 bits that differ, in all likelihood, between values that differ. Reads them once, at memory's speed."""
    sums = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.contiguous().reshape(-1).view(torch.uint8)
        words = flat[: flat.numel() // 4 * 4].view(torch.int32).sum(dtype=torch.int64)
        rest = flat[flat.numel() // 4 * 4 :].sum(dtype=torch.int64)
        sums.update(f"{int(words)} {int(rest)}".encode())
    return int.from_bytes(sums.digest()[:8], "little") >> 1
