"""Ways to sum one flat tensor over a group, from messages between two members.

*Ring* (Patarasuk and Yuan 2009): 2 (w - 1) rounds, each member sends 2 (w - 1)/w of the tensor, all to one neighbour.
*Halving-doubling* (Thakur et al. 2005): 2 log2 w rounds with the same bytes, so fewer latencies; members beyond the
largest power of two hand their values to a partner first and get the result back. *Scatter-gather*: every part goes
straight to the member that sums it, and back from there: two rounds in all. *Library*: what torch.distributed does.

All leave the same bits on every member: each part is summed in one place and copied from there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from shoal.ops import AllGather, AllReduce, AllToAll, Exchange, SendRecv

Algorithm = Literal["library", "ring", "halving_doubling", "scatter_gather"]


def library(values: Tensor, group: str, index: int, size: int) -> Exchange:
    """Sum `values`, shape (n,), in place; `index`: this member's place in the group of `size`."""
    del index, size
    yield AllReduce(values, values, group)


def ring(values: Tensor, group: str, index: int, size: int) -> Exchange:
    """The same around a ring: first every part is summed on its way round, then the sums go round."""
    parts = _parts(values, size)
    after, before = (index + 1) % size, (index - 1) % size
    arriving = torch.empty_like(parts[0])
    for round_ in range(size - 1):
        leaving, added = parts[(index - round_) % size], parts[(index - round_ - 1) % size]
        into = arriving[: len(added)]
        yield SendRecv(leaving, after, into, before, group)
        added.add_(into)
    for round_ in range(size - 1):
        leaving, replaced = parts[(index + 1 - round_) % size], parts[(index - round_) % size]
        yield SendRecv(leaving, after, replaced, before, group)


def halving_doubling(values: Tensor, group: str, index: int, size: int) -> Exchange:
    """The same by halves: with a partner at distance w/2, w/4, ... each keeps and sums one half; then back."""
    core = 1 << (size.bit_length() - 1)
    outside = size - core
    if index >= core:
        yield SendRecv(values, index - core, None, None, group)
        yield SendRecv(None, None, values, index - core, group)
        return
    if index < outside:
        extra = torch.empty_like(values)
        yield SendRecv(None, None, extra, index + core, group)
        values.add_(extra)
    yield from _halve_and_double(values, group, index, core)
    if index < outside:
        yield SendRecv(values, index + core, None, None, group)


def scatter_gather(values: Tensor, group: str, index: int, size: int) -> Exchange:
    """The same in two rounds: an all-to-all of parts, whose sums are gathered."""
    del index
    length = -(-values.numel() // size)
    rows = torch.nn.functional.pad(values, (0, size * length - values.numel())).view(size, length)
    received = yield AllToAll(rows, group)
    gathered = yield AllGather(received.sum(dim=0), group)
    values.copy_(gathered.view(-1)[: values.numel()])


ALGORITHMS: dict[str, Callable[[Tensor, str, int, int], Exchange]] = {
    "library": library,
    "ring": ring,
    "halving_doubling": halving_doubling,
    "scatter_gather": scatter_gather,
}


def _parts(values: Tensor, size: int) -> list[Tensor]:
    """Cut into `size` parts, the first ones longest; some are empty where values are few."""
    length = -(-values.numel() // size)
    return [values[min(i * length, len(values)) : min((i + 1) * length, len(values))] for i in range(size)]


def _halve_and_double(values: Tensor, group: str, index: int, core: int) -> Exchange:
    taken: list[tuple[int, Tensor, Tensor]] = []  # (partner, half kept, half given away), widest first
    distance, whole = core // 2, values
    while distance:
        middle = -(-len(whole) // 2)
        lower, upper = whole[:middle], whole[middle:]
        kept, given = (lower, upper) if index & distance == 0 else (upper, lower)
        into = torch.empty_like(kept)
        yield SendRecv(given, index ^ distance, into, index ^ distance, group)
        kept.add_(into)
        taken.append((index ^ distance, kept, given))
        distance, whole = distance // 2, kept
    for partner, kept, given in reversed(taken):
        yield SendRecv(kept, partner, given, partner, group)
