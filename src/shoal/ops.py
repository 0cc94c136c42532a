"""The vocabulary of communication: what a sync algorithm may ask for, as plain records.

A sync writes its exchange once, as a generator that yields these records and receives their results. Who performs
them is another matter: `engine/exchange/communicator.py` on real transports, `wire/inprocess.py` in one process for
tests.

Groups are named, not held: the interpreter knows which ranks and which transport stand behind a name.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WORLD = "world"
"""All ranks."""
NODE = "node"
"""The ranks of this rank's own node."""
LEADERS = "leaders"
"""The first rank of every node."""
SERVERS = "servers"
"""The parameter servers, which are no ranks."""


@dataclass(frozen=True, slots=True)
class AllReduce:
    """Sum `source` over the group into every member's `target` (same shape; they may be the same memory).

    After it, `source` holds nothing of use. Result: None.
    """

    source: Any
    target: Any
    group: str


@dataclass(frozen=True, slots=True)
class Broadcast:
    """Copy the group's member `root`'s `tensor` into everybody's `tensor`. Result: None."""

    tensor: Any
    root: int
    group: str


@dataclass(frozen=True, slots=True)
class AllToAll:
    """Send row r of `tensor`, shape (group size, n), to member r. Result: the rows received, same shape."""

    tensor: Any
    group: str


@dataclass(frozen=True, slots=True)
class AllGather:
    """Collect every member's `tensor`, shape (n,). Result: shape (group size, n), in order of rank."""

    tensor: Any
    group: str


@dataclass(frozen=True, slots=True)
class SendRecv:
    """Send `tensor` to the group's member `to` while receiving `into` from its member `source`; None: no such side.

    Both sides of a message come to the same operation count of their exchange; shapes and dtypes are known to both.
    Result: None.
    """

    tensor: Any
    to: int | None
    into: Any
    source: int | None
    group: str


@dataclass(frozen=True, slots=True)
class Barrier:
    """Wait until every member is here. Result: None."""

    group: str


@dataclass(frozen=True, slots=True)
class Push:
    """Send this worker's update of its step `clock` to the parameter servers that hold `tensors`' names.

    The worker has scaled it already (by its share of the samples): servers sum. The tensors must stay as they are until
    the result is there. Result: None, once every server, and its replica where there is one, has acknowledged.
    """

    tensors: Mapping[str, Any]
    clock: int
    group: str = SERVERS


@dataclass(frozen=True, slots=True)
class Pull:
    """Fetch named values from the parameter servers, for a worker that has finished `clock` steps.

    Result: tensors by name, as fresh as the servers' staleness bound promises for `clock`.
    """

    names: Sequence[str]
    clock: int
    group: str = SERVERS


ServerOp = Push | Pull
"""What a client of parameter servers performs; no collective, so it is not among `Op`."""
Op = AllReduce | Broadcast | AllToAll | AllGather | SendRecv | Barrier
Exchange = Generator[Op, Any, Any]
"""What a sync writes: yields operations, receives their results, may return a value."""
