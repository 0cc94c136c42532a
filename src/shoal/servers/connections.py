"""A client's links to all servers, the requests under way on them, and what to do when a server is lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import zmq

from shoal.errors import PeerLostError, ServerLostError, ServerRefusedError, WireError
from shoal.servers.requests import Pending, Request
from shoal.wire.blocks import keep_large_blocks
from shoal.wire.bulk import MAX_MESSAGE_BYTES, Link
from shoal.wire.frame import Message, Operation
from shoal.wire.secrets import Secrets

_TICK_S = 0.05
Log = Callable[..., None]


@dataclass(frozen=True, kw_only=True)
class ClientConfig:
    """One worker's connections.

    Attributes:
        addresses: of all servers, in order.
        rank: this worker's global rank.
        secrets: the servers' keys, or None if they have none.
        connect_timeout_s: a server that was never reached for this long is lost.
        lost_after_s: a server whose connection broke and did not come back for this long is lost.
        timeout_s: how long a result waits. In bsp and ssp that covers waiting for the slowest worker.
        replicate: whether sparse tables have replicas; for dense pieces, the pieces say it.
        epoch: of the view that these updates belong to; 0 where workers do not change.
        in_name: updates are brought in the name of `rank`, and not by it.
        lost: servers known to be gone.
        is_over: whether nobody waits for results any more, because the view has ended.
    """

    addresses: tuple[str, ...]
    rank: int
    secrets: Secrets | None = None
    connect_timeout_s: float = 30.0
    lost_after_s: float = 3.0
    timeout_s: float = 600.0
    replicate: bool = False
    max_message_bytes: int = MAX_MESSAGE_BYTES
    epoch: int = 0
    in_name: bool = False
    lost: frozenset[int] = frozenset()
    is_over: Callable[[], bool] = lambda: False


class Connections:
    """Sends requests, takes answers, fails over. Used by one thread at a time."""

    def __init__(self, config: ClientConfig, log: Log) -> None:
        """Start connecting to all servers; does not wait."""
        keep_large_blocks()
        self._config = config
        self._log = log
        self._context = zmq.Context()
        self._started = time.monotonic()
        self._links = {
            index: Link(
                self._context,
                index,
                address,
                secrets=config.secrets,
                max_message_bytes=config.max_message_bytes,
            )
            for index, address in enumerate(config.addresses)
            if index not in config.lost
        }
        self._poller = zmq.Poller()
        for link in self._links.values():
            self._poller.register(link.socket, zmq.POLLIN)
            self._poller.register(link.monitor, zmq.POLLIN)
        self._open: dict[int, Request] = {}
        self.lost = {
            index: f"server {index} at {address} was lost before"
            for index, address in enumerate(config.addresses)
            if index in config.lost
        }
        """Servers not to ask any more, and why."""
        self.bytes_sent = 0
        self.bytes_received = 0

    @property
    def alive(self) -> list[int]:
        """Servers that may be asked."""
        return list(self._links)

    def oldest_sequence(self, default: int) -> int:
        """The lowest sequence that is not yet acknowledged."""
        return min((r.header.sequence for r in self._open.values() if r.header.sequence), default=default)

    def submit(self, requests: Sequence[Request], finish: Callable[[], Any] = lambda: None) -> Pending[Any]:
        """Send requests; the result is what `finish` returns when all are answered."""
        self.send(requests)
        return self.pending(requests, finish)

    def send(self, requests: Sequence[Request]) -> None:
        """Send requests in this order."""
        for request in requests:
            self._open[request.header.request] = request
            self._send(request)

    def pending(self, requests: Sequence[Request], finish: Callable[[], Any] = lambda: None) -> Pending[Any]:
        """What comes of requests that were sent."""
        return Pending(requests, self._pump, finish, self._config.timeout_s)

    def _send(self, request: Request) -> None:
        """To the first holder that is not lost."""
        alive = [server for server in request.holders if server not in self.lost]
        if not alive:
            reasons = "; ".join(dict.fromkeys(self.lost[server] for server in request.holders))
            self._fail(request, ServerLostError(f"{request.what} failed: {reasons}; no other server holds it"))
            return
        request.server = alive[0]
        self.bytes_sent += self._links[request.server].send(request.header, request.tensors)

    def _pump(self, timeout_s: float) -> None:
        """Take what has come, for at most `timeout_s` (or less), and see to lost servers.

        Raises:
            PeerLostError: nobody waits any more.
        """
        if self._config.is_over():
            raise PeerLostError("the view ended while a parameter server was waited for")
        self._poller.poll(int(min(timeout_s, _TICK_S) * 1000))
        for link in list(self._links.values()):
            while link.index in self._links and (answer := link.receive()) is not None:
                self._take(link, answer)
            if link.index in self._links and link.read_events():
                self._ask_again(link.index)
        self._check_links()

    def _take(self, link: Link, answer: Message) -> None:
        request = self._open.get(answer.header.request)
        if request is None or request.server != link.index:
            return  # of an earlier connection
        match answer.header.operation:
            case Operation.DONE:
                self.bytes_received += sum(entry.size_bytes for entry in answer.entries)
                if request.arrived is not None:
                    request.arrived(answer)
                request.answer = answer
                del self._open[answer.header.request]
            case Operation.REFUSED:
                where = f"server {link.index} at {link.address}"
                self._fail(request, ServerRefusedError(f"{where} refused {request.what}: {answer.document()}"))
            case Operation.OUTDATED:
                self._fail(request, PeerLostError(f"{request.what} is of a view that has ended: others went on"))
            case Operation.MOVED:
                self._lose(link.index, f"server {link.index} at {link.address} was replaced by its replicas")

    def _check_links(self) -> None:
        config = self._config
        for link in list(self._links.values()):
            if link.connected:
                continue
            where = f"server {link.index} at {link.address}"
            if link.refused:
                self._refused(link, where)
            elif not link.ever_connected and link.down_s > config.connect_timeout_s:
                reason = f"{where} could not be reached for {link.down_s:.1f} s: is it running, and is the port open?"
                self._lose(link.index, reason)
            elif link.ever_connected and link.down_s > config.lost_after_s:
                self._lose(link.index, f"{where} was lost: its connection broke {link.down_s:.1f} s ago and stayed so")

    def _refused(self, link: Link, where: str) -> None:
        keys = "this worker's keys" if self._config.secrets else "this worker, which has no keys"
        error = ServerRefusedError(
            f"{where} does not accept {keys} ({link.refusals} handshakes failed in "
            f"{time.monotonic() - self._started:.1f} s): use the secrets file that the servers were started with"
        )
        for request in [request for request in self._open.values() if request.server == link.index]:
            self._fail(request, error)

    def _lose(self, index: int, reason: str) -> None:
        if index in self.lost:
            return
        self.lost[index] = reason
        link = self._links.pop(index)
        self._poller.unregister(link.socket)
        self._poller.unregister(link.monitor)
        link.close()
        self._log("server_lost", server=index, message=reason)
        for request in [request for request in self._open.values() if request.server == index]:
            self._send(request)

    def _ask_again(self, index: int) -> None:
        for request in self._open.values():
            if request.server == index:
                self.bytes_sent += self._links[index].send(request.header, request.tensors)

    def _fail(self, request: Request, error: WireError) -> None:
        request.error = error
        self._open.pop(request.header.request, None)

    def close(self) -> None:
        """Close all links; what is under way is lost."""
        for link in self._links.values():
            link.close()
        self._links.clear()
        self._context.term()
