"""Control messages over gRPC: JSON documents, a stream for each member and single questions.

`/shoal.Coordinator/Attend` is a stream both ways, `/shoal.Coordinator/Ask` one document for one document. No schema is
compiled: who reads a document checks it. Each call carries the run's token as metadata; with TLS it is encrypted and
the server proves itself, without, anybody on the network can read the token: only for networks that you trust.

The server is asynchronous and has one thread, so whoever answers needs no locks. The client is for threads.
gRPC's own keepalive is off: who must know that the other side lives sends a document now and then.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from shoal.errors import CoordinatorError
from shoal.wire.tls import ServerTls

Document = dict[str, Any]
MAX_MESSAGE_BYTES = 1 << 20
_SERVICE = "shoal.Coordinator"
_TOKEN = "shoal-token"
_FLUSH_S = 2.0  # for the last documents to a client that may have been stopped
_SIZES = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES), ("grpc.max_send_message_length", MAX_MESSAGE_BYTES)]
# Without SO_REUSEPORT: two servers at one port would each get some of the clients.
_SERVER_OPTIONS: list[tuple[str, Any]] = [*_SIZES, ("grpc.so_reuseport", 0)]
_CLIENT_OPTIONS: list[tuple[str, Any]] = [
    *_SIZES,
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.min_reconnect_backoff_ms", 2000),  # which is also how long one attempt to connect may take
]


class Stream:
    """The server's end of one member's stream. Used on the server's thread."""

    def __init__(self, requests: AsyncIterator[bytes]) -> None:
        self._requests = requests
        self._outgoing: asyncio.Queue[bytes | None] = asyncio.Queue()

    async def receive(self) -> Document | None:
        """The next document, or None when the client has said its last.

        Raises:
            CoordinatorError: what came is no document.
        """
        async for data in self._requests:
            return _decode(data)
        return None

    def send(self, document: Document) -> None:
        """Send soon. Never waits."""
        self._outgoing.put_nowait(_encode(document))

    def close(self) -> None:
        """End the stream once all has been sent."""
        self._outgoing.put_nowait(None)

    async def outgoing(self) -> bytes | None:
        """For the transport: the next bytes to send."""
        return await self._outgoing.get()


Attend = Callable[[Stream], Awaitable[None]]
"""Serves one stream: returns to end it; is cancelled when the client's connection breaks or the stream was closed."""
Ask = Callable[[Document], Document]
"""Answers one question. A CoordinatorError that it raises goes to the asker."""


class ControlServer:
    """The server; all on one thread, in one event loop."""

    def __init__(self, attend: Attend, ask: Ask, *, token: str) -> None:
        """Prepare; `bind`, then `start`. `token` must be known to every client."""
        self._attend = attend
        self._ask = ask
        self._token = token.encode()
        self._server: Any = None

    def bind(self, address: str, *, tls: ServerTls | None = None) -> str:
        """Take `address` (`HOST:PORT`, port 0: the system chooses). Returns it with its port. Call in a running loop.

        Raises:
            CoordinatorError: the address cannot be bound, or the certificate cannot be used.
        """
        _prepare_grpc()
        import grpc.aio

        handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            "Attend": grpc.stream_stream_rpc_method_handler(self._on_attend),
            "Ask": grpc.unary_unary_rpc_method_handler(self._on_ask),
        }
        server = grpc.aio.server(options=_SERVER_OPTIONS)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))
        try:
            if tls is None:
                port = server.add_insecure_port(address)
            else:
                pair = (tls.key.read_bytes(), tls.certificate.read_bytes())
                port = server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
        except (RuntimeError, OSError) as error:
            raise CoordinatorError(f"the coordinator cannot listen at {address}: {error}") from None
        self._server = server
        return f"{address.rpartition(':')[0]}:{port}"

    async def start(self) -> None:
        """Let clients in."""
        await self._server.start()

    async def stop(self) -> None:
        """End all streams, stop listening."""
        await self._server.stop(grace=None)

    async def _on_attend(self, requests: AsyncIterator[bytes], context: Any) -> None:
        await self._admit(context)
        stream = Stream(requests)
        reader = asyncio.ensure_future(self._attend(stream))
        writer = asyncio.ensure_future(_write(stream, context))
        try:
            await asyncio.wait((reader, writer), return_when=asyncio.FIRST_COMPLETED)
            if reader.done():
                stream.close()
                await asyncio.wait((writer,), timeout=_FLUSH_S)
        finally:
            for task in (reader, writer):
                task.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)
        if not reader.cancelled() and (error := reader.exception()) is not None:
            raise error

    async def _on_ask(self, request: bytes, context: Any) -> bytes:
        import grpc

        await self._admit(context)
        try:
            return _encode(self._ask(_decode(request)))
        except CoordinatorError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            raise AssertionError("abort returns") from None

    async def _admit(self, context: Any) -> None:
        import grpc

        got = dict(context.invocation_metadata() or ()).get(_TOKEN, "")
        if not hmac.compare_digest(str(got).encode(), self._token):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token is not this run's")


async def _write(stream: Stream, context: Any) -> None:
    while (data := await stream.outgoing()) is not None:
        await context.write(data)


class ControlClient:
    """A connection to the coordinator; it is made with the first call."""

    def __init__(self, address: str, *, token: str, authority: Path | None = None) -> None:
        """Prepare.

        Args:
            address: the coordinator's `HOST:PORT`.
            authority: the certificate (PEM) that vouches for the server; None talks without TLS.

        Raises:
            CoordinatorError: the certificate cannot be read.
        """
        _prepare_grpc()
        import grpc

        self.address = address
        self._metadata = ((_TOKEN, token),)
        if authority is None:
            self._channel = grpc.insecure_channel(address, options=_CLIENT_OPTIONS)
        else:
            try:
                credentials = grpc.ssl_channel_credentials(authority.read_bytes())
            except OSError as error:
                raise CoordinatorError(f"cannot read the certificate {authority}: {error.strerror}") from None
            self._channel = grpc.secure_channel(address, credentials, options=_CLIENT_OPTIONS)
        self._call: Any = None

    def attend(self, documents: Iterator[Document]) -> Iterator[Document]:
        """Send `documents` (taken on another thread, until they end) and yield what comes, until the server ends.

        Raises:
            CoordinatorError: it cannot be reached, vanished (`refused` False), or knows another token (True).
        """
        import grpc

        call: Any = self._channel.stream_stream(f"/{_SERVICE}/Attend")
        try:
            self._call = call((_encode(document) for document in documents), metadata=self._metadata)
            for data in self._call:
                yield _decode(data)
        except grpc.RpcError as error:
            raise self._translate(error) from None

    def ask(self, document: Document, *, timeout_s: float = 5.0) -> Document:
        """Ask one question.

        Raises:
            CoordinatorError: no answer within `timeout_s`, or a refusal.
        """
        import grpc

        call: Any = self._channel.unary_unary(f"/{_SERVICE}/Ask")
        try:
            return _decode(call(_encode(document), metadata=self._metadata, timeout=timeout_s))
        except grpc.RpcError as error:
            raise self._translate(error) from None

    def cancel(self) -> None:
        """Break `attend` off, from any thread."""
        if self._call is not None:
            self._call.cancel()

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _translate(self, error: Any) -> CoordinatorError:
        import grpc

        details, refusals = str(error.details()), (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.INVALID_ARGUMENT)
        if error.code() in refusals:
            return CoordinatorError(f"the coordinator at {self.address} refused: {details}", refused=True)
        return CoordinatorError(f"cannot reach the coordinator at {self.address}: {details}")


def ask(
    address: str, document: Document, *, token: str, authority: Path | None = None, timeout_s: float = 5.0
) -> Document:
    """Ask one question over a connection of its own; see `ControlClient`."""
    with contextlib.closing(ControlClient(address, token=token, authority=authority)) as client:
        return client.ask(document, timeout_s=timeout_s)


def _prepare_grpc() -> None:
    """Settings that gRPC reads from the environment when it is imported."""
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # processes that we fork do not use it
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # else each refused handshake is a line on standard error


def _encode(document: Document) -> bytes:
    return json.dumps(document, separators=(",", ":"), allow_nan=False).encode()


def _decode(data: bytes) -> Document:
    try:
        document = json.loads(data)
    except ValueError as error:
        raise CoordinatorError(f"got {len(data)} bytes that are not JSON: {error}") from None
    if not isinstance(document, dict):
        raise CoordinatorError(f"got {type(document).__name__}, expected a document")
    return document
