"""A state on its way: who is behind takes it from several peers at once, each of which sends another part.

Each piece carries a checksum (CRC-32): what arrives damaged ends the view, and is asked for again in the next.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from shoal.engine.build import Parts
from shoal.engine.checkpoint import tree
from shoal.engine.memories import bytes_of, copy_range, pieces_of
from shoal.engine.restoring import restore
from shoal.engine.views.standing import Roles
from shoal.errors import PeerLostError
from shoal.wire.checksum import NUM_BYTES, check, checksum
from shoal.wire.group import Group

_MOST_STEPS = 8
"""While a state travels its taker keeps each step's gradients, and later takes all those steps at once."""


class Giving:
    """One giver's part of the state.

    In the background it makes way for training: pieces leave while no gradients are on the wires, and besides as many
    a step as it takes to be done in `_MOST_STEPS`.
    """

    def __init__(self, group: Group, tensors: list[Tensor], part: Roles, rank: int) -> None:
        self._group = group
        self._memories = [bytes_of(tensor.cpu()) for tensor in tensors]
        self._part = part
        self._index = part.givers.index(rank)
        self._copied = threading.Event()
        self._changed = threading.Condition()
        self._is_exchanging = False
        self._overdue = 0  # so many pieces leave whatever is on the wires

    def give(self) -> None:
        """Send it; the tensors do not change meanwhile."""
        self._send(self._pieces(), self._memories, 0)

    def begin(self) -> None:
        """Copy it, then send the copy, in the background."""
        threading.Thread(target=self._copy_and_send, daemon=True, name="shoal-giving").start()

    def before_update(self) -> None:
        """Wait until it is copied: from then on the tensors may change."""
        self._copied.wait()

    def make_way(self) -> None:
        """From now on gradients are on the wires."""
        with self._changed:
            self._is_exchanging = True
            self._overdue += -(-sum(1 for _ in self._pieces()) // _MOST_STEPS)
            self._changed.notify_all()

    def go_on(self) -> None:
        """All gradients have arrived, or never will."""
        with self._changed:
            self._is_exchanging = False
            self._changed.notify_all()

    def _copy_and_send(self) -> None:
        try:
            pieces = list(self._pieces())
            start = pieces[0].start if pieces else 0
            copy = torch.empty(pieces[-1].stop - start if pieces else 0, dtype=torch.uint8)
            for piece in pieces:
                copy_range(self._memories, piece, copy[piece.start - start : piece.stop - start], into=False)
            self._copied.set()
            with contextlib.suppress(RuntimeError, PeerLostError):  # training waits for the same peers, and tells
                self._send(iter(pieces), [copy], start)
        finally:
            self._copied.set()

    def _pieces(self) -> Iterator[range]:
        return pieces_of(sum(map(len, self._memories)), self._index, len(self._part.givers))

    def _send(self, pieces: Iterator[range], memories: list[Tensor], start: int) -> None:
        under_way: list[Any] = []
        for number, piece in enumerate(pieces):
            self._wait_for_way(number)
            message = torch.empty(len(piece) + NUM_BYTES, dtype=torch.uint8)
            copy_range(memories, range(piece.start - start, piece.stop - start), message, into=False)
            message[len(piece) :] = checksum(message[: len(piece)])
            sent = [(message, self._group.send(message, taker)) for taker in self._part.takers]
            for _, work in under_way:
                work.wait()
            under_way = sent
        for _, work in under_way:
            work.wait()

    def _wait_for_way(self, number: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._is_exchanging or number < self._overdue)


class Taking:
    """What a taker is sent. Attributes: `tensors`: by name; whole when `take` or `wait` has returned."""

    def __init__(self, group: Group, message: dict[str, Any], part: Roles) -> None:
        """`message`: what the teller told."""
        self._group = group
        self._message = message
        self._part = part
        described = message["tensors"]
        self.tensors = {
            name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in described.items()
        }
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def begin(self) -> None:
        """Take it in the background."""
        self._thread = threading.Thread(target=self._run, daemon=True, name="shoal-taking")
        self._thread.start()

    @property
    def has_arrived(self) -> bool:
        """Whether it is there, or will never be: `wait` tells."""
        return self._thread is not None and not self._thread.is_alive()

    def wait(self) -> None:
        """Wait until it is there.

        Raises:
            PeerLostError: a giver vanished, or a piece arrived damaged.
        """
        assert self._thread is not None
        self._thread.join()
        if self._error is not None:
            raise PeerLostError(f"the state did not arrive: {self._error}") from self._error

    def install(self, parts: Parts) -> None:
        """Put it into this rank's parts."""
        state = tree.decode(self._message["state"], self.tensors)
        restore(parts, state | {"progress": self._message["progress"]})

    def take(self) -> None:
        """Receive every piece.

        Raises:
            PeerLostError: a piece arrived damaged.
        """
        memories = [bytes_of(tensor) for tensor in self.tensors.values()]
        total, givers = sum(map(len, memories)), self._part.givers
        streams = [(giver, pieces_of(total, index, len(givers))) for index, giver in enumerate(givers)]
        while streams:
            arriving = []
            for giver, pieces in list(streams):
                piece = next(pieces, None)
                if piece is None:
                    streams.remove((giver, pieces))
                    continue
                message = torch.empty(len(piece) + NUM_BYTES, dtype=torch.uint8)
                arriving.append((giver, piece, message, self._group.receive(message, giver)))
            for giver, piece, message, work in arriving:
                work.wait()
                what = f"a piece of the state (bytes {piece.start} to {piece.stop}) from rank {giver}"
                check(message[: len(piece)], message[len(piece) :], what)
                copy_range(memories, piece, message, into=True)

    def _run(self) -> None:
        try:
            self.take()
        except BaseException as error:
            self._error = error
