"""The frames of the parameter servers: a fixed header, a table of tensors, then one raw part for each tensor.

    part 0   [ magic | version | operation | flags | request | rank | clock | sequence | oldest | counts and sizes ]
             [ entry 0: name length, dtype code, number of dims, dims, name ] [ entry 1 ] ...
    part 1   the bytes of tensor 0, as they lie in memory (little-endian, contiguous)
    part 2   ...

There is no pickle and nothing is evaluated. `decode` holds every number of a frame against every other before a tensor
is made, and makes tensors on the received memory itself: a lying header costs a message, never memory.
"""

from __future__ import annotations

import enum
import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

MAGIC = b"SHPS"
VERSION = 1
MAX_ENTRIES = 4096
MAX_NAME_BYTES = 512
MAX_DIMS = 8

_FIXED = struct.Struct("<4sHBBQiqQQIIQ")
_ENTRY = struct.Struct("<HBB")

DTYPES: tuple[torch.dtype, ...] = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)
"""A dtype's code on the wire is its place here; new ones are appended."""
_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}


class Operation(enum.IntEnum):
    """What a frame asks for, or answers."""

    LOAD = 1
    PUSH = 2
    PULL = 3
    PUSH_ROWS = 4
    PULL_ROWS = 5
    DUMP = 6
    LEAVE = 7
    STATUS = 8
    STOP = 9
    MEMBERS = 10
    """The workers of a new view: an update of an earlier view is `OUTDATED` from now on."""
    PARTS = 11
    """Which parts of a round were learned from: see `servers.ledger`."""
    DONE = 64
    """The answer: carried out. Its tensors are the result."""
    REFUSED = 65
    """The answer: not carried out, and asking again will not help. Tensor `text` says why."""
    MOVED = 66
    """The answer: another server holds these keys now."""
    OUTDATED = 67
    """The answer: not carried out, since it is of an earlier view of the workers."""


FORWARDED = 1
"""Flag: a primary hands this update on to its replica."""
IN_NAME = 2
"""Flag: this update is brought in the name of its worker, which may have brought it itself."""
EPOCH_BITS = 32
"""An update's sequence is numbered within a view; above these bits stands the view's epoch."""


class FrameError(ValueError):
    """A frame that is not one, or that contradicts itself. The message says in what."""


@dataclass(frozen=True, slots=True)
class Header:
    """The fixed part of a frame.

    Attributes:
        request: the asker's number for this request; its answer carries the same.
        rank: the worker's global rank, -1 where none is meant.
        clock: the worker's step, see `strategy.sync.staleness`.
        sequence: the update's number, unique for its worker: a repeated update has the same one.
        oldest: no update of this worker with a lower sequence will come again.
    """

    operation: Operation
    request: int = 0
    rank: int = -1
    clock: int = 0
    sequence: int = 0
    oldest: int = 0
    flags: int = 0


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor as the table describes it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(slots=True)
class Message:
    """A checked frame. `parts[i]` is the memory of entry i, alive as long as this message or a tensor on it is."""

    header: Header
    entries: tuple[Entry, ...]
    parts: Sequence[Any] = field(repr=False)

    def tensor(self, index: int) -> Tensor:
        """Tensor `index`, on the received memory itself."""
        entry = self.entries[index]
        if entry.size_bytes == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)
        return torch.frombuffer(_buffer(self.parts[index]), dtype=entry.dtype).view(entry.shape)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {entry.name: self.tensor(index) for index, entry in enumerate(self.entries)}

    def document(self, index: int = 0) -> Any:
        """Entry `index` as the JSON that `text` packed.

        Raises:
            FrameError: it is not JSON.
        """
        try:
            return json.loads(bytes(_buffer(self.parts[index])))
        except (ValueError, RecursionError) as error:
            raise FrameError(f"entry {index} is not JSON: {error}") from None


def text(document: Any) -> Tensor:
    """Any JSON document as a uint8 tensor, which `Message.document` reads."""
    return torch.frombuffer(bytearray(json.dumps(document).encode()), dtype=torch.uint8)


def encode(header: Header, tensors: Sequence[tuple[str, Tensor]]) -> tuple[bytes, list[memoryview]]:
    """Part 0 and the memory of each tensor: views, not copies, so a tensor must stay as it is until it has been sent.

    Args:
        tensors: on the CPU and contiguous, of a dtype of `DTYPES`, with up to `MAX_DIMS` dims.
    """
    table = b"".join(_encode_entry(name, tensor) for name, tensor in tensors)
    memory = [memory_of(tensor) for _, tensor in tensors]
    fixed = _FIXED.pack(
        MAGIC,
        VERSION,
        header.operation,
        header.flags,
        header.request,
        header.rank,
        header.clock,
        header.sequence,
        header.oldest,
        len(tensors),
        len(table),
        sum(part.nbytes for part in memory),
    )
    return fixed + table, memory


def decode(head: bytes | memoryview, parts: Sequence[Any]) -> Message:
    """Check a frame in full; allocates nothing of the size that it claims.

    Args:
        head: part 0.
        parts: the other parts: bytes, or ZeroMQ frames.

    Raises:
        FrameError: it is not a frame of this version, or its numbers contradict each other.
    """
    view = memoryview(head)
    if view.nbytes < _FIXED.size:
        raise FrameError(f"the header has {view.nbytes} bytes, expected at least {_FIXED.size}")
    fields = _FIXED.unpack_from(view)
    magic, version, code, flags, request, rank, clock, sequence, oldest, num_entries, table_bytes, size_bytes = fields
    if magic != MAGIC or version != VERSION:
        raise FrameError(f"got magic {magic!r} version {version}, expected {MAGIC!r} version {VERSION}")
    if code not in Operation._value2member_map_:
        raise FrameError(f"unknown operation {code}")
    if num_entries > MAX_ENTRIES or num_entries != len(parts):
        raise FrameError(f"the header names {num_entries} tensors, but {len(parts)} parts came (limit {MAX_ENTRIES})")
    if table_bytes != view.nbytes - _FIXED.size:
        raise FrameError(f"the header names a table of {table_bytes} bytes, but {view.nbytes - _FIXED.size} came")
    arrived = [len(part) for part in parts]
    if size_bytes != sum(arrived):
        raise FrameError(f"the header names {size_bytes} bytes of tensors, but {sum(arrived)} came")
    entries = _decode_table(view[_FIXED.size :], num_entries)
    for entry, length in zip(entries, arrived, strict=True):
        if entry.size_bytes != length:
            raise FrameError(f"{entry.name} {entry.shape} takes {entry.size_bytes} bytes, but {length} came")
    return Message(Header(Operation(code), request, rank, clock, sequence, oldest, flags), entries, parts)


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    assert tensor.device.type == "cpu", f"{tensor.device} memory cannot be sent: copy it to the CPU first"
    flat = tensor.detach().reshape(-1)
    if flat.numel() == 0:
        return memoryview(b"")
    return flat.view(torch.uint8).numpy().data


def _encode_entry(name: str, tensor: Tensor) -> bytes:
    raw = name.encode()
    assert len(raw) <= MAX_NAME_BYTES, f"name of {len(raw)} bytes: {name[:40]}..."
    assert tensor.dim() <= MAX_DIMS, f"{name} has {tensor.dim()} dims"
    dims = struct.pack(f"<{tensor.dim()}q", *tensor.shape)
    return _ENTRY.pack(len(raw), _CODES[tensor.dtype], tensor.dim()) + dims + raw


def _decode_table(table: memoryview, num_entries: int) -> tuple[Entry, ...]:
    entries, at = [], 0
    for _ in range(num_entries):
        if table.nbytes - at < _ENTRY.size:
            raise FrameError("the table ends inside an entry")
        name_bytes, code, num_dims = _ENTRY.unpack_from(table, at)
        at += _ENTRY.size
        if name_bytes > MAX_NAME_BYTES or code >= len(DTYPES) or num_dims > MAX_DIMS:
            raise FrameError(f"an entry has a name of {name_bytes} bytes, dtype code {code} and {num_dims} dims")
        if table.nbytes - at < 8 * num_dims + name_bytes:
            raise FrameError("the table ends inside an entry")
        shape = struct.unpack_from(f"<{num_dims}q", table, at)
        at += 8 * num_dims
        try:
            name = str(table[at : at + name_bytes], "utf-8")
        except UnicodeDecodeError:
            raise FrameError("a name is not UTF-8") from None
        at += name_bytes
        if any(size < 0 for size in shape):
            raise FrameError(f"{name} has the shape {shape}")
        entries.append(Entry(name, DTYPES[code], shape))
    if at != table.nbytes:
        raise FrameError(f"the table has {table.nbytes - at} bytes too many")
    return tuple(entries)


def _buffer(part: Any) -> memoryview:
    """A part's memory: a ZeroMQ frame's own, or a copy of bytes (which torch may not write to)."""
    memory = getattr(part, "buffer", None)
    return memory if isinstance(memory, memoryview) else memoryview(bytearray(part))
