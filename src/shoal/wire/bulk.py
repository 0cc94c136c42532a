"""Bulk request and reply over ZeroMQ: a `Listener` (ROUTER) that many `Link`s (DEALER) talk to.

Payloads leave from tensor memory and arrive in the memory that a tensor is then made on: no copy in this process on
either side. ZeroMQ's own threads move the bytes, so a transfer goes on while Python computes. Who sends large tensors
in pieces (see `strategy.sync.sharding`) lets the receiver work on one while the next arrives.

With `Secrets`, every byte is encrypted and both sides prove themselves (CURVE, curvezmq.org). Without, anybody who
reaches the port can read and change the training: only for networks that you trust.

A frame that is not one is dropped and counted; one part larger than `max_message_bytes` ends its connection, before
memory for it is allocated (ZMQ_MAXMSGSIZE).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import zmq
from torch import Tensor
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import recv_monitor_message

from shoal.errors import RendezvousError
from shoal.wire.frame import FrameError, Header, Message, decode, encode
from shoal.wire.secrets import Secrets

MAX_MESSAGE_BYTES = 1 << 30
_COPY_BELOW_BYTES = 64 * 1024  # below, a copy costs less than ZeroMQ's bookkeeping of who still uses the memory
_RECEIVE_QUEUE = 64  # messages a connection; beyond it, TCP holds the sender back
_HEARTBEAT_MS = 2000
_SILENCE_MS = 10000
_REFUSALS = 3  # handshakes that must fail before a key counts as wrong: a server that is just dying fails one, too

_STRANGER_S = 5.0  # a server that never let us in for so long, and failed one handshake, is not one that is just dying

Dropped = Callable[[str], None]


class Listener:
    """The server's socket. Used by one thread."""

    def __init__(
        self,
        address: str,
        *,
        secrets: Secrets | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        on_drop: Dropped = lambda reason: None,
    ) -> None:
        """Bind.

        Args:
            address: `tcp://HOST:PORT`; port `*` lets the system choose one, which `self.address` then names.
            max_message_bytes: the largest tensor that is taken.
            on_drop: called with the reason for every frame that is dropped.

        Raises:
            RendezvousError: the address cannot be bound.
        """
        self._context = zmq.Context()
        self._authenticator = _authenticator(self._context, secrets) if secrets else None
        self.socket = self._context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # so that a worker that has gone is an error, and not silence
        self.socket.setsockopt(zmq.HANDSHAKE_IVL, 5000)
        _common_options(self.socket, max_message_bytes)
        if secrets:
            self.socket.curve_server = True
            self.socket.curve_secretkey = secrets.server_secret.encode()
        try:
            self.socket.bind(address)
        except zmq.ZMQError as error:
            self.close()
            raise RendezvousError(f"a parameter server cannot listen at {address}: {error.strerror}") from None
        self.address: str = str(self.socket.getsockopt_string(zmq.LAST_ENDPOINT)).rstrip("\0")
        self.dropped = 0
        self._on_drop = on_drop

    def receive(self) -> tuple[bytes, Message] | None:
        """The next whole frame and who sent it, or None if none is there now."""
        while True:
            try:
                identity, *parts = self.socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return None
            try:
                return identity.bytes, decode_parts(parts)
            except FrameError as error:
                self.drop(str(error))

    def drop(self, reason: str) -> None:
        """Count a frame that cannot be used."""
        self.dropped += 1
        self._on_drop(reason)

    def send(self, identity: bytes, header: Header, tensors: Sequence[tuple[str, Tensor]] = ()) -> list[Any]:
        """Answer `identity`. Returns trackers of the memory that is sent from directly: done when it may change."""
        try:
            self.socket.send(identity, zmq.SNDMORE | zmq.NOBLOCK)
            return _send(self.socket, header, tensors)
        except zmq.ZMQError:  # it has gone: its next connection will ask again
            return []

    def close(self) -> None:
        """Unbind and end ZeroMQ's threads; answers still under way are given a second to leave."""
        if hasattr(self, "socket"):
            self.socket.close(linger=1000)
        if self._authenticator:
            self._authenticator.stop()
        self._context.term()


class Link:
    """A client's connection to one server: reconnects by itself, and knows how long it has been down and why.

    `index` and `address` say which server. Used by one thread at a time.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        index: int,
        address: str,
        *,
        secrets: Secrets | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        self.index = index
        self.address = address
        self.connected = False
        self.ever_connected = False
        self.refusals = 0
        self.down_since = time.monotonic()
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.RECONNECT_IVL, 50)
        self.socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
        _common_options(self.socket, max_message_bytes)
        if secrets:
            self.socket.curve_serverkey = secrets.server_public.encode()
            self.socket.curve_publickey = secrets.worker_public.encode()
            self.socket.curve_secretkey = secrets.worker_secret.encode()
        self.monitor: zmq.Socket[Any] | None = self.socket.get_monitor_socket(_EVENTS)
        self.socket.connect(address)

    @property
    def refused(self) -> bool:
        """Whether the server is there, but one side does not accept the other's key."""
        enough = _REFUSALS if self.ever_connected or self.down_s < _STRANGER_S else 1
        return not self.connected and self.refusals >= enough

    @property
    def down_s(self) -> float:
        """For how long there has been no connection."""
        return 0.0 if self.connected else time.monotonic() - self.down_since

    def send(self, header: Header, tensors: Sequence[tuple[str, Tensor]] = ()) -> int:
        """Queue a frame; the tensors must stay as they are until it is answered. Returns its size in bytes."""
        # A server that refuses our key ends the connection for good: `read_events` says so to whoever waits.
        with contextlib.suppress(zmq.Again):
            _send(self.socket, header, tensors)
        return sum(tensor.numel() * tensor.element_size() for _, tensor in tensors)

    def receive(self) -> Message | None:
        """The next whole frame, or None if none is there now. What is not a frame is passed over."""
        while True:
            try:
                return decode_parts(self.socket.recv_multipart(zmq.NOBLOCK, copy=False))
            except zmq.Again:
                return None
            except FrameError:
                continue

    def read_events(self) -> bool:
        """Take note of what happened to the connection. Returns whether it was made anew: then, ask again."""
        made_anew = False
        while self.monitor is not None and self.monitor.poll(0):
            event = recv_monitor_message(self.monitor)["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                made_anew |= self.ever_connected
                self.connected = self.ever_connected = True
                self.refusals = 0
            elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self.refusals += _REFUSALS  # the server has said so itself, and ZeroMQ does not try again
            elif event in _FAILED_HANDSHAKES:
                self.refusals += 1
            elif event == zmq.EVENT_DISCONNECTED:
                # Before a handshake succeeded, the other side has hung up on us: a server without these keys does so.
                self.refusals += not self.connected
                self.down_since = time.monotonic() if self.connected else self.down_since
                self.connected = False
        return made_anew

    def close(self) -> None:
        """Close at once; what has not left is dropped."""
        monitor, self.monitor = self.monitor, None
        if monitor is not None:
            self.socket.disable_monitor()
            monitor.close(linger=0)
            self.socket.close(linger=0)


def decode_parts(parts: Sequence[zmq.Frame]) -> Message:
    """`frame.decode` of ZeroMQ's frames."""
    if not parts:
        raise FrameError("an empty message")
    return decode(parts[0].buffer, parts[1:])


_FAILED_HANDSHAKES = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
)
_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | sum(_FAILED_HANDSHAKES)


def _common_options(socket: zmq.Socket[Any], max_message_bytes: int) -> None:
    socket.setsockopt(zmq.MAXMSGSIZE, max_message_bytes)
    socket.setsockopt(zmq.SNDHWM, 0)  # what is queued is tensor memory that exists anyway
    socket.setsockopt(zmq.RCVHWM, _RECEIVE_QUEUE)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _SILENCE_MS)


def _send(socket: zmq.Socket[Any], header: Header, tensors: Sequence[tuple[str, Tensor]]) -> list[Any]:
    head, memory = encode(header, tensors)
    socket.send(head, zmq.NOBLOCK | (zmq.SNDMORE if memory else 0))
    trackers = []
    for number, part in enumerate(memory, start=1):
        flags = zmq.NOBLOCK | (zmq.SNDMORE if number < len(memory) else 0)
        if part.nbytes < _COPY_BELOW_BYTES:
            socket.send(part, flags)
        else:
            trackers.append(socket.send(part, flags, copy=False, track=True))
    return trackers


def _authenticator(context: zmq.Context[Any], secrets: Secrets) -> ThreadAuthenticator:
    authenticator = ThreadAuthenticator(context)
    authenticator.start()
    authenticator.configure_curve_callback("*", credentials_provider=_OnlyWorkers(secrets.worker_public))
    return authenticator


class _OnlyWorkers:
    """ZAP's question whether a key may come in."""

    def __init__(self, worker_public: str) -> None:
        self._worker_public = worker_public.encode()

    def callback(self, domain: str, key: bytes) -> bool:
        return key == self._worker_public
