"""Which parameter server holds what: large parameters cut along dim 0, pieces spread by a hash and balanced by bytes.

Pure functions of names, shapes and counts: every worker and every server comes to the same answer by itself.
Pieces are placed in descending size, each on the server that holds the fewest bytes so far (longest processing time
first, Graham 1969): no server holds more than the mean plus one piece. A hash of the key breaks ties, so equal
parameters do not pile up on server 0. Rows of sparse tables are many and equal: there the hash alone balances.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PIECE_BYTES = 2 * 1024 * 1024
"""The size at which a parameter is cut: see docs/performance.md for what was measured."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows `start` to `stop` of one parameter.

    Attributes:
        key: its name on the servers: the parameter's own if it is whole, else with the rows behind it.
        parameter: the parameter's name.
        start, stop: the range along dim 0; 0 and 0 for a parameter without dims.
        size_bytes: of its values.
        primary: the server that answers for it.
        replica: the server that holds it too, or None.
    """

    key: str
    parameter: str
    start: int
    stop: int
    size_bytes: int
    primary: int
    replica: int | None


def assign(
    shapes: Mapping[str, Sequence[int]],
    itemsizes: Mapping[str, int],
    num_servers: int,
    *,
    replicate: bool,
    piece_bytes: int = PIECE_BYTES,
) -> tuple[Piece, ...]:
    """Cut parameters into pieces and give each its servers.

    Args:
        shapes: of each parameter, by name.
        itemsizes: bytes of one value of each.
        num_servers: >= 1, and >= 2 to replicate.
        replicate: whether each piece has a replica on another server.
        piece_bytes: pieces are at most so large, except where one row of a parameter is larger already.

    Returns:
        In order of the parameters, and of the rows within each.
    """
    assert num_servers >= (2 if replicate else 1), f"{num_servers} servers cannot hold replicas: at least 2 can"
    cut = [(name, *rows) for name in shapes for rows in _cut(shapes[name], itemsizes[name], piece_bytes)]
    keys = [name if stop - start == _rows(shapes[name]) else f"{name}[{start}:{stop}]" for name, start, stop, _ in cut]
    primaries = _balance({key: size for key, (*_, size) in zip(keys, cut, strict=True)}, num_servers)
    return tuple(
        Piece(key, name, start, stop, size, primaries[key], _replica(key, primaries[key], num_servers, replicate))
        for key, (name, start, stop, size) in zip(keys, cut, strict=True)
    )


def server_of_rows(ids: NDArray[np.int64], num_servers: int) -> NDArray[np.int64]:
    """The server of each row id of a sparse table, shape as `ids`; the same for every table."""
    with np.errstate(over="ignore"):
        mixed = ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing (Knuth 6.4)
    return ((mixed >> np.uint64(33)) % np.uint64(num_servers)).astype(np.int64)


def replica_of_rows(server: int, num_servers: int, *, replicate: bool) -> int | None:
    """The server that holds the rows of `server`, too."""
    return (server + 1) % num_servers if replicate else None


def _rows(shape: Sequence[int]) -> int:
    return shape[0] if shape else 0


def _cut(shape: Sequence[int], itemsize: int, piece_bytes: int) -> list[tuple[int, int, int]]:
    """(start, stop, bytes) of each piece: rows as equal as they can be."""
    rows, total = _rows(shape), math.prod(shape) * itemsize
    num_pieces = max(1, min(rows, -(-total // piece_bytes)))
    if num_pieces == 1:
        return [(0, rows, total)]
    row_bytes = total // rows
    limit = max(1, piece_bytes // row_bytes)  # rows
    num_pieces = -(-rows // limit)
    bounds = [rows * index // num_pieces for index in range(num_pieces + 1)]
    return [(a, b, (b - a) * row_bytes) for a, b in itertools.pairwise(bounds)]


def _balance(sizes: Mapping[str, int], num_servers: int) -> dict[str, int]:
    loads = [0] * num_servers
    primaries: dict[str, int] = {}
    for key in sorted(sizes, key=lambda key: (-sizes[key], key)):
        first = _hash(key) % num_servers
        primaries[key] = min(range(num_servers), key=lambda server: (loads[server], (server - first) % num_servers))
        loads[primaries[key]] += sizes[key]
    return primaries


def _replica(key: str, primary: int, num_servers: int, replicate: bool) -> int | None:
    """Spread by the hash, so that a lost server's work falls on all others."""
    if not replicate:
        return None
    return (primary + 1 + _hash(f"replica of {key}") % (num_servers - 1)) % num_servers


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
