"""A primary's side of replication: updates forwarded to the replica in order, and who waits for its word.

An update is acknowledged to its worker only when the replica has it, so what is acknowledged survives the loss of any
one server. The replica applies the same updates by the same rules in the same order and so holds the same bits.
A replica that is lost is given up for good: the primary goes on alone.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import zmq
from torch import Tensor

from shoal.wire.bulk import Link
from shoal.wire.frame import FORWARDED, Header, Message, Operation
from shoal.wire.secrets import Secrets


@dataclass(slots=True)
class _Forward:
    header: Header
    tensors: Sequence[tuple[str, Tensor]]
    done: Callable[[Message | None], None]


class Replicas:
    """Links to the servers that replicate this one's keys. Used by the server's thread."""

    def __init__(
        self, *, secrets: Secrets | None, max_message_bytes: int, lost_after_s: float, on_lost: Callable[[int], None]
    ) -> None:
        """Nothing is connected until `forward`.

        Args:
            lost_after_s: a replica without a connection for longer is lost.
            on_lost: called with its index, before those who wait for it are told.
        """
        self._context = zmq.Context()
        self._secrets = secrets
        self._max_message_bytes = max_message_bytes
        self._lost_after_s = lost_after_s
        self._on_lost = on_lost
        self._addresses: Sequence[str] = ()
        self._links: dict[int, Link] = {}
        self._lost: set[int] = set()
        self._waiting: dict[int, dict[int, _Forward]] = {}
        self._numbers = itertools.count(1)
        self.bytes_sent = 0

    def know(self, addresses: Sequence[str]) -> None:
        """The addresses of all servers, by index."""
        self._addresses = addresses

    @property
    def sockets(self) -> list[object]:
        """What to poll for."""
        return [link.socket for link in self._links.values()]

    def forward(
        self,
        replica: int,
        header: Header,
        tensors: Sequence[tuple[str, Tensor]],
        done: Callable[[Message | None], None],
    ) -> None:
        """Send an update on. `done` gets the replica's answer, or None if the replica is lost."""
        if replica in self._lost:
            done(None)
            return
        number = next(self._numbers)
        header = dataclasses.replace(header, request=number, flags=header.flags | FORWARDED)
        link = self._link(replica)
        self._waiting[replica][number] = _Forward(header, tensors, done)
        self.bytes_sent += link.send(header, tensors)

    def attend(self) -> None:
        """Take answers, and notice replicas that are lost."""
        for index, link in list(self._links.items()):
            if link.read_events():
                for forward in self._waiting[index].values():  # the old connection may have swallowed some
                    link.send(forward.header, forward.tensors)
            while (answer := link.receive()) is not None:
                waiting = self._waiting[index].pop(answer.header.request, None)
                if waiting is not None:
                    waiting.done(answer)
            if link.refused or link.down_s > self._lost_after_s:
                self._give_up(index)

    def close(self) -> None:
        """Close all links."""
        for link in self._links.values():
            link.close()
        self._context.term()

    def _link(self, index: int) -> Link:
        if index not in self._links:
            self._links[index] = Link(
                self._context,
                index,
                self._addresses[index],
                secrets=self._secrets,
                max_message_bytes=self._max_message_bytes,
            )
            self._waiting[index] = {}
        return self._links[index]

    def _give_up(self, index: int) -> None:
        self._lost.add(index)
        self._links.pop(index).close()
        self._on_lost(index)
        for forward in self._waiting.pop(index).values():
            forward.done(None)


def refused(answer: Message | None) -> str | None:
    """The replica's reason, if it did not take the update."""
    if answer is None or answer.header.operation != Operation.REFUSED:
        return None
    return str(answer.document())
