"""A worker's side of the parameter servers: all of them at once, from one thread.

`push` and `pull` queue messages and return at once; ZeroMQ's thread moves them while the caller computes; `result`
waits. A server that is lost is replaced by the replica of its keys: what it had not acknowledged is sent again under
the same sequence number, so that it counts once.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import zmq
from torch import Tensor

from shoal.errors import ServerLostError, ServerRefusedError, WireError
from shoal.job.sparse_rows import TableSpec
from shoal.ops import Pull, Push, ServerOp
from shoal.servers.requests import Pending, Request
from shoal.servers.routing import Routing
from shoal.strategy.sync.sharding import PIECE_BYTES, Piece
from shoal.wire.bulk import MAX_MESSAGE_BYTES, Link
from shoal.wire.frame import Header, Message, Operation, text
from shoal.wire.secrets import Secrets

_TICK_S = 0.05
_MAX_KEYS = 256  # a message
_NOTHING = torch.empty(0, dtype=torch.uint8)
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
    """

    addresses: tuple[str, ...]
    rank: int
    secrets: Secrets | None = None
    connect_timeout_s: float = 30.0
    lost_after_s: float = 3.0
    timeout_s: float = 600.0
    replicate: bool = False
    max_message_bytes: int = MAX_MESSAGE_BYTES


class ServerClient:
    """Used by one thread at a time."""

    def __init__(
        self,
        config: ClientConfig,
        pieces: Sequence[Piece] = (),
        *,
        log: Log = lambda kind, **fields: None,
    ) -> None:
        """Start connecting to all servers; does not wait.

        Args:
            pieces: where the dense parameters lie, from `sharding.assign`; the same on every worker.
            log: called as `log("server_lost", server=..., message=...)` when a replica takes over.
        """
        self._config = config
        self._routing = Routing(pieces, len(config.addresses), replicate=config.replicate)
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
        }
        self._poller = zmq.Poller()
        for link in self._links.values():
            self._poller.register(link.socket, zmq.POLLIN)
            self._poller.register(link.monitor, zmq.POLLIN)
        self._moved: dict[int, str] = {}  # servers not to ask any more -> why
        self._open: dict[int, Request] = {}
        self._numbers = itertools.count(1)
        self._sequences = itertools.count(1)
        self.bytes_sent = 0
        self.bytes_received = 0

    def perform(self, op: ServerOp) -> Any:
        """Carry out a `Push` or a `Pull` and wait for its result.

        Raises:
            ServerLostError, ServerRefusedError: see `Pending.result`.
        """
        match op:
            case Push(tensors, clock):
                return self.push(tensors, clock).result()
            case Pull(names, clock):
                return self.pull(names, clock).result()

    def load(self, tensors: Mapping[str, Tensor], *, clock: int = 0) -> None:
        """Put initial values on the servers (replicas too) and wait. One worker does it, before anybody pulls.

        Args:
            clock: the step that training starts from.
        """
        requests = []
        for piece in self._routing.pieces_of(tensors):
            value = self._routing.cut(piece, tensors[piece.parameter])
            requests += self._loads(piece.key, (piece.primary, piece.replica), "dense", clock, {"value": value})
        self._submit(requests).result()

    def create_table(self, name: str, spec: TableSpec, *, clock: int = 0) -> None:
        """Create an empty sparse table on all servers and wait. One worker does it; the others call `know_table`."""
        self.know_table(name, spec)
        requests = []
        for server in range(len(self._config.addresses)):
            key, holders = self._routing.table_shard(name, server)
            pair = (holders[0], holders[1] if len(holders) > 1 else None)
            requests += self._loads(key, pair, "table", clock, {}, table=spec.document())
        self._submit(requests).result()

    def know_table(self, name: str, spec: TableSpec) -> None:
        """Say what a table is that another worker has created."""
        self._routing.tables[name] = spec

    def push(self, tensors: Mapping[str, Tensor], clock: int) -> Pending[None]:
        """Send this worker's updates of its step `clock`.

        Args:
            tensors: updates by parameter name, of the parameters' shapes and dtypes, on the CPU and scaled already.
                They are sent from where they lie: leave them as they are until the result is there.

        Returns:
            Done when every holder has acknowledged: it survives the loss of one server then, if there are replicas.
        """
        requests = []
        for group in self._routing.grouped(tensors, PIECE_BYTES, _MAX_KEYS):
            parts = [(piece.key, self._routing.cut(piece, tensors[piece.parameter])) for piece in group]
            header = self._header(Operation.PUSH, clock, sequence=next(self._sequences))
            requests.append(Request(header, parts, self._routing.holders(group[0]), f"the push of {_names(group)}"))
        return self._submit(requests)

    def pull(
        self, names: Sequence[str], clock: int, into: Mapping[str, Tensor] | None = None
    ) -> Pending[dict[str, Tensor]]:
        """Fetch values for a worker that has finished `clock` steps.

        Args:
            into: tensors (contiguous, on the CPU) to fill as answers come in; without, new ones are made.

        Returns:
            Tensors by name, the caller's own.
        """
        result: dict[str, Tensor] = dict(into) if into is not None else {}
        requests = []
        for group in self._routing.grouped(names, PIECE_BYTES, _MAX_KEYS):
            parts = [(piece.key, _NOTHING) for piece in group]
            request = Request(
                self._header(Operation.PULL, clock),
                parts,
                self._routing.holders(group[0]),
                f"the pull of {_names(group)}",
            )
            request.arrived = functools.partial(_place, group, self._routing.num_rows, result)
            requests.append(request)
        return self._submit(requests, lambda: {name: result[name] for name in names})

    def push_rows(self, table: str, ids: Tensor, gradients: Tensor, clock: int) -> Pending[None]:
        """Send the gradients of some rows of a table; ids must be distinct (`SparseTable.collect` makes them so).

        Every server gets a message, if with no rows, so that its clocks move on.

        Args:
            ids: int64, shape (n,).
            gradients: shape (n, dim), of the table's dtype.
        """
        requests = []
        sequence = next(self._sequences)
        for server, places in enumerate(self._routing.split_rows(table, ids)):
            key, holders = self._routing.table_shard(table, server)
            rows = gradients if places is None else gradients.index_select(0, places)
            parts = [("ids", ids if places is None else ids[places]), (key, rows.contiguous())]
            header = self._header(Operation.PUSH_ROWS, clock, sequence=sequence)
            requests.append(Request(header, parts, holders, f"the push of {ids.numel()} rows of {table}"))
        return self._submit(requests)

    def pull_rows(self, table: str, ids: Tensor, clock: int) -> Pending[Tensor]:
        """Fetch rows of a table, shape (n, dim), in the order of `ids`, int64 of shape (n,); repeated ids may occur."""
        spec = self._routing.tables[table]
        split = self._routing.split_rows(table, ids)
        result: list[Tensor] = []
        if len(split) > 1:
            result.append(torch.empty((ids.numel(), spec.dim), dtype=spec.torch_dtype))
        requests = []
        for server, places in enumerate(split):
            if places is not None and places.numel() == 0:
                continue
            key, holders = self._routing.table_shard(table, server)
            wanted = ids if places is None else ids[places]
            request = Request(
                self._header(Operation.PULL_ROWS, clock),
                [(key, wanted.contiguous())],
                holders,
                f"the pull of {ids.numel()} rows of {table}",
            )
            request.arrived = functools.partial(_place_rows, result, places)
            requests.append(request)
        return self._submit(requests, lambda: result[0])

    def leave(self) -> None:
        """Tell all servers that this worker pushes no more, so that bsp and ssp do not wait for it."""
        self._ask_all(Operation.LEAVE, "the leave of this worker")

    def status(self) -> dict[int, dict[str, Any]]:
        """What each server that is alive says of itself: keys, size_bytes, updates, waiting, dropped and more."""
        answers = self._ask_all(Operation.STATUS, "its status")
        return {index: answer.document() for index, answer in answers.items()}

    def stop_servers(self) -> None:
        """End all servers that are alive."""
        self._ask_all(Operation.STOP, "the stop")

    def dump(self) -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
        """All state of all keys and tables, from one holder of each: key -> (a JSON document, tensors by name).

        Consistent if no worker pushes meanwhile. Pieces carry their cut in their keys: load it with the same pieces.
        """
        result: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {}
        requests = []
        for key, holders in self._routing.all_keys():
            request = Request(self._header(Operation.DUMP, 0), [(key, _NOTHING)], holders, f"the state of {key}")
            request.arrived = functools.partial(_place_dump, key, result)
            requests.append(request)
        self._submit(requests).result()
        return result

    def restore(self, state: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Tensor]]], *, clock: int) -> None:
        """Put a `dump` back on the servers (replicas too) and wait. One worker does it, when all tables are known.

        Args:
            clock: the step that training goes on from.
        """
        requests = []
        for key, holders in self._routing.all_keys():
            document, tensors = state[key]
            pair = (holders[0], holders[1] if len(holders) > 1 else None)
            requests += self._loads(
                key, pair, document["kind"], clock, tensors, table=document.get("table"), state=document["state"]
            )
        self._submit(requests).result()

    def close(self) -> None:
        """Close all connections; what is under way is lost."""
        for link in self._links.values():
            link.close()
        self._links.clear()
        self._context.term()

    def _loads(
        self,
        key: str,
        holders: tuple[int, int | None],
        kind: str,
        clock: int,
        tensors: Mapping[str, Tensor],
        **more: Any,
    ) -> list[Request]:
        requests = []
        primary, replica = holders
        for server in (primary, replica):
            if server is None or server in self._moved:
                continue
            document = {"key": key, "kind": kind, "clock": clock, **more}
            alone = replica is None or {primary, replica} & self._moved.keys()
            document |= {"primary": server == primary or bool(alone)}
            document |= {"replica": replica if server == primary and not alone else None}
            parts = [("document", text(document)), *((name, item.contiguous()) for name, item in tensors.items())]
            requests.append(Request(self._header(Operation.LOAD, clock), parts, (server,), f"the load of {key}"))
        return requests

    def _header(self, operation: Operation, clock: int, sequence: int = 0) -> Header:
        oldest = min((r.header.sequence for r in self._open.values() if r.header.sequence), default=sequence)
        return Header(operation, next(self._numbers), self._config.rank, clock, sequence, oldest)

    def _submit(self, requests: Sequence[Request], finish: Callable[[], Any] = lambda: None) -> Pending[Any]:
        for request in requests:
            self._open[request.header.request] = request
            self._send(request)
        return Pending(requests, self._pump, finish, self._config.timeout_s)

    def _send(self, request: Request) -> None:
        """To the first holder that is not lost."""
        alive = [server for server in request.holders if server not in self._moved]
        if not alive:
            reasons = "; ".join(dict.fromkeys(self._moved[server] for server in request.holders))
            self._fail(request, ServerLostError(f"{request.what} failed: {reasons}; no other server holds it"))
            return
        request.server = alive[0]
        self.bytes_sent += self._links[request.server].send(request.header, request.tensors)

    def _pump(self, timeout_s: float) -> None:
        """Take what has come, for at most `timeout_s` (or less), and see to lost servers."""
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
        if index in self._moved:
            return
        self._moved[index] = reason
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

    def _ask_all(self, operation: Operation, what: str) -> dict[int, Message]:
        requests = {index: Request(self._header(operation, 0), (), (index,), what) for index in self._links}
        self._submit(list(requests.values())).result()
        return {index: request.answer for index, request in requests.items() if request.answer is not None}


def _place(group: Sequence[Piece], num_rows: Mapping[str, int], result: dict[str, Tensor], answer: Message) -> None:
    """Put the pieces of an answer where they belong."""
    for index, piece in enumerate(group):
        value = answer.tensor(index)
        name = piece.parameter
        if name not in result and piece.key == name:
            result[name] = value  # whole: the received memory is the result
            continue
        if name not in result:
            result[name] = torch.empty((num_rows[name], *value.shape[1:]), dtype=value.dtype)
        target = result[name] if piece.key == name else result[name][piece.start : piece.stop]
        target.copy_(value)


def _place_rows(result: list[Tensor], places: Tensor | None, answer: Message) -> None:
    rows = answer.tensor(0)
    if places is None:
        result.append(rows)
    else:
        result[0].index_copy_(0, places, rows)


def _place_dump(key: str, result: dict[str, Any], answer: Message) -> None:
    tensors = answer.tensors()
    del tensors["document"]
    result[key] = (answer.document(), tensors)


def _names(group: Sequence[Piece]) -> str:
    names = list(dict.fromkeys(piece.key for piece in group))
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
