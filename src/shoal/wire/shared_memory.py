"""The ranks of one node reduce in shared memory, and nothing is sent.

Gradients live in memory that all ranks of the node map (`stitched.py`). A reduction is: wait until every rank has
written; each rank sums its own slice of all contributions, in place, in pieces that stay in its cache; wait again. The
order of the sum is fixed for each slice, so every run gives the same bits, and all ranks read the same memory.

Ranks wake each other by single bytes over Unix sockets, one a pair: a rank that dies closes its sockets, so that the
others know at once. Linux only.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shoal.errors import PeerLostError, RendezvousError
from shoal.ops import AllReduce, Barrier, Broadcast, Op
from shoal.wire import stitched
from shoal.wire.traffic import Traffic
from shoal.wire.transport import Memory

_PIECE_BYTES = 128 * 1024  # of each contribution: the sum's operands stay in a core's second-level cache
_TOKEN_BYTES = 16

available = stitched.available


@dataclass(frozen=True)
class _Shared:
    """One allocation: every rank's own contribution, and the slice that this rank sums."""

    files: list[Tensor]
    own: slice


class SharedMemoryTransport:
    """The node group on CPU. `AllReduce` and `Broadcast` take only memory that `allocate` made.

    Attributes:
        is_stuck: whether a thread waits although the view was cut; here a cut frees all.
    """

    is_stuck = False

    def __init__(
        self,
        index: int,
        size: int,
        publish: Callable[[str, bytes], None],
        lookup: Callable[[str], bytes],
        *,
        timeout_s: float,
    ) -> None:
        """Connect to the node's other ranks. Collective over the node.

        Args:
            index: this rank's place on the node, 0 to size - 1.
            publish, lookup: a key-value store that all ranks of the node share; `lookup` waits for the key.
            timeout_s: a peer silent for longer counts as lost.
        """
        self._index = index
        self._size = size
        self._peers = _connect(index, size, publish, lookup, timeout_s)
        self._allocations: dict[int, _Shared] = {}
        self._mappings: list[stitched.StitchedMemory] = []
        self.traffic = Traffic()  # stays empty: nothing leaves the machine

    def allocate(self, num_values: int, dtype: torch.dtype) -> Memory:
        """Shared memory: `source` is this rank's own file, `target` the stitched view."""
        slice_bytes = stitched.slice_bytes(num_values * dtype.itemsize, self._size)
        descriptors = self._exchange_descriptors(stitched.create_file(slice_bytes * self._size))
        try:
            mapping = stitched.StitchedMemory(descriptors, slice_bytes)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        self._mappings.append(mapping)
        files = [mapping.file(index, num_values, dtype) for index in range(self._size)]
        start, end = (min(i * slice_bytes // dtype.itemsize, num_values) for i in (self._index, self._index + 1))
        own = slice(start, end)
        self._allocations[files[self._index].data_ptr()] = _Shared(files, own)
        return Memory(files[self._index], mapping.stitched(num_values, dtype), own)

    def perform(self, op: Op) -> Any:
        """Carry out an AllReduce, Broadcast or Barrier."""
        match op:
            case AllReduce(source):
                self._barrier()
                self._sum_own_slice(self._allocations[source.data_ptr()])
                self._barrier()
            case Broadcast(_, root):
                # The root has written into memory that everybody sees: only the news of it has to travel.
                self._signal() if root == self._index else self._await(root)
            case Barrier():
                self._barrier()
            case _:
                raise AssertionError(f"{type(op).__name__} does not run over shared memory")

    def cut(self) -> None:
        """End what waits for another rank, here and there; from any thread."""
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the sockets. The mappings stay until `unmap`, since tensors may still point into them."""
        for peer in self._peers.values():
            peer.close()

    def unmap(self) -> None:
        """Give the memory back: no tensor that `allocate` made may be used any more."""
        for mapping in self._mappings:
            mapping.close()
        self._mappings.clear()
        self._allocations.clear()

    def _sum_own_slice(self, shared: _Shared) -> None:
        total = shared.files[self._index]
        others = [file for index, file in enumerate(shared.files) if index != self._index]
        step = _PIECE_BYTES // total.element_size()
        for start in range(shared.own.start, shared.own.stop, step):
            piece = slice(start, min(start + step, shared.own.stop))
            for other in others:
                total[piece].add_(other[piece])

    def _barrier(self) -> None:
        self._signal()
        for index in self._peers:
            self._await(index)

    def _signal(self) -> None:
        for index, peer in self._peers.items():
            try:
                peer.send(b"\0")
            except OSError as error:
                raise self._lost(index, error) from None

    def _await(self, index: int) -> None:
        try:
            token = self._peers[index].recv(1)
        except OSError as error:
            raise self._lost(index, error) from None
        if not token:
            raise self._lost(index, None)

    def _lost(self, index: int, error: OSError | None) -> PeerLostError:
        reason = "its connection closed" if error is None else f"{error.strerror or error}"
        return PeerLostError(f"local rank {self._index} lost local rank {index} of the same node: {reason}")

    def _exchange_descriptors(self, own: int) -> list[int]:
        """Give every peer this rank's file and take theirs; the descriptors are the caller's to close."""
        descriptors = {self._index: own}
        try:
            for index, peer in self._peers.items():
                self._give(index, peer, own)
            for index, peer in self._peers.items():
                descriptors[index] = self._take(index, peer)
        except BaseException:
            for descriptor in descriptors.values():
                os.close(descriptor)
            raise
        return [descriptors[index] for index in range(self._size)]

    def _give(self, index: int, peer: socket.socket, descriptor: int) -> None:
        try:
            socket.send_fds(peer, [b"\1"], [descriptor])
        except OSError as error:
            raise self._lost(index, error) from None

    def _take(self, index: int, peer: socket.socket) -> int:
        try:
            message, received, _, _ = socket.recv_fds(peer, 1, 1)
        except OSError as error:
            raise self._lost(index, error) from None
        if message != b"\1" or len(received) != 1:
            raise self._lost(index, None)
        return received[0]


def _connect(
    index: int,
    size: int,
    publish: Callable[[str, bytes], None],
    lookup: Callable[[str], bytes],
    timeout_s: float,
) -> dict[int, socket.socket]:
    """One stream to every other rank of the node; who connects proves itself by a secret from the store."""
    token = os.urandom(_TOKEN_BYTES)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind("")  # Linux chooses a free abstract address: no file to leave behind
        listener.listen(size)
        publish(f"shared_memory/{index}", token + bytes(listener.getsockname()))
        peers = {other: _dial(lookup(f"shared_memory/{other}"), index, timeout_s) for other in range(index)}
        listener.settimeout(timeout_s)
        while len(peers) < size - 1:
            accepted = _welcome(listener, token, timeout_s)
            if accepted is not None:
                peers[accepted[0]] = accepted[1]
    return dict(sorted(peers.items()))


def _dial(entry: bytes, index: int, timeout_s: float) -> socket.socket:
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        peer.connect(entry[_TOKEN_BYTES:])
        peer.sendall(entry[:_TOKEN_BYTES] + struct.pack("<I", index))
    except OSError as error:
        peer.close()
        raise RendezvousError(f"a rank of the same node cannot be reached: {error.strerror or error}") from None
    return _with_timeout(peer, timeout_s)


def _welcome(listener: socket.socket, token: bytes, timeout_s: float) -> tuple[int, socket.socket] | None:
    try:
        peer, _ = listener.accept()
    except TimeoutError:
        raise RendezvousError(f"a rank of the same node did not connect within {timeout_s:.0f} s") from None
    peer.settimeout(5.0)
    greeting = b""
    with contextlib.suppress(OSError):
        greeting = peer.recv(_TOKEN_BYTES + 4, socket.MSG_WAITALL)
    if len(greeting) != _TOKEN_BYTES + 4 or not hmac.compare_digest(greeting[:_TOKEN_BYTES], token):
        peer.close()  # a stranger: nobody else on this machine has any business here
        return None
    return int(struct.unpack("<I", greeting[_TOKEN_BYTES:])[0]), _with_timeout(peer, timeout_s)


def _with_timeout(peer: socket.socket, timeout_s: float) -> socket.socket:
    peer.settimeout(None)
    # By the kernel: Python's own timeout costs a second system call.
    limit = struct.pack("ll", int(timeout_s), int(timeout_s % 1 * 1e6))
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    return peer
