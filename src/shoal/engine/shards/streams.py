"""Bytes between ranks: each sends to several and receives from several at once, in pieces with a checksum (CRC-32)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shoal.engine.memories import copy_range, pieces_of
from shoal.wire.checksum import NUM_BYTES, check, checksum
from shoal.wire.group import Group

Memories = Sequence[Tensor]
"""Tensors of bytes, shape (n,), taken as one run."""


def swap(group: Group, outgoing: Mapping[int, Memories], incoming: Mapping[int, Memories], what: str) -> None:
    """Send `outgoing` to ranks, and fill `incoming` with what ranks send. Each side knows the other's sizes.

    Args:
        what: it is, for messages.

    Raises:
        PeerLostError: a piece arrived damaged.
        RuntimeError, PeerLostError: a rank vanished.
    """
    sending = {to: pieces_of(_size(memories), 0, 1) for to, memories in outgoing.items()}
    receiving = {source: pieces_of(_size(memories), 0, 1) for source, memories in incoming.items()}
    while sending or receiving:
        arriving = []
        for source, left in list(receiving.items()):
            piece = next(left, None)
            if piece is None:
                del receiving[source]
                continue
            message = torch.empty(len(piece) + NUM_BYTES, dtype=torch.uint8)
            arriving.append((source, piece, message, group.receive(message, source)))
        leaving = []
        for to, left in list(sending.items()):
            piece = next(left, None)
            if piece is None:
                del sending[to]
                continue
            message = torch.empty(len(piece) + NUM_BYTES, dtype=torch.uint8)
            copy_range(outgoing[to], piece, message, into=False)
            message[len(piece) :] = checksum(message[: len(piece)])
            leaving.append((message, group.send(message, to)))
        for source, piece, message, work in arriving:
            work.wait()
            told = f"a piece of {what} (bytes {piece.start} to {piece.stop}) from rank {source}"
            check(message[: len(piece)], message[len(piece) :], told)
            copy_range(incoming[source], piece, message, into=True)
        for _, work in leaving:
            work.wait()


def gather(group: Group, own: Any) -> list[Any]:
    """Every rank's plain value, by rank. Collective.

    Raises:
        RuntimeError, PeerLostError: a rank vanished.
    """
    text = json.dumps(own).encode()
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(group.size)]
    group.all_gather(sizes, torch.tensor([len(text)]))
    longest = max(int(size) for size in sizes)
    padded = torch.frombuffer(bytearray(text.ljust(longest)), dtype=torch.uint8)
    rows = [torch.empty_like(padded) for _ in range(group.size)]
    group.all_gather(rows, padded)
    return [json.loads(row.numpy().tobytes()) for row in rows]


def _size(memories: Memories) -> int:
    return sum(map(len, memories))
