"""A worker's side of the parameter servers: all of them at once, from one thread.

`push` and `pull` queue messages and return at once; ZeroMQ's thread moves them while the caller computes; `result`
waits. A server that is lost is replaced by the replica of its keys: what it had not acknowledged is sent again under
the same sequence number, so that it counts once.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shoal.errors import ServerLostError
from shoal.job.sparse_rows import TableSpec
from shoal.ops import Pull, Push, ServerOp
from shoal.servers.connections import ClientConfig, Connections, Log
from shoal.servers.requests import Pending, Request
from shoal.servers.routing import Routing
from shoal.strategy.codec.feedback import Coder
from shoal.strategy.sync.sharding import PIECE_BYTES, Piece
from shoal.wire.frame import EPOCH_BITS, IN_NAME, Header, Message, Operation, text

_MAX_KEYS = 256  # a message
_NOTHING = torch.empty(0, dtype=torch.uint8)


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
        self._connections = Connections(config, log)
        self._numbers = itertools.count(1)
        self._sequences = itertools.count(1 + _first_sequence(config))
        self.read_clock = 0
        """Every worker's updates of all steps before this one are in the values of the last pull (bsp and ssp)."""

    @property
    def bytes_sent(self) -> int:
        """Payload bytes sent so far, repeats included."""
        return self._connections.bytes_sent

    @property
    def bytes_received(self) -> int:
        """Payload bytes of answers so far."""
        return self._connections.bytes_received

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
        self._connections.submit(requests).result()

    def create_table(self, name: str, spec: TableSpec, *, clock: int = 0) -> None:
        """Create an empty sparse table on all servers and wait. One worker does it; the others call `know_table`."""
        self.know_table(name, spec)
        requests = []
        for server in range(len(self._config.addresses)):
            key, holders = self._routing.table_shard(name, server)
            pair = (holders[0], holders[1] if len(holders) > 1 else None)
            requests += self._loads(key, pair, "table", clock, {}, table=spec.document())
        self._connections.submit(requests).result()

    def know_table(self, name: str, spec: TableSpec) -> None:
        """Say what a table is that another worker has created."""
        self._routing.tables[name] = spec

    def push(self, tensors: Mapping[str, Tensor], clock: int, coder: Coder | None = None) -> Pending[None]:
        """Send this worker's updates of its step `clock`.

        Args:
            tensors: updates by parameter name, of the parameters' shapes and dtypes, on the CPU and scaled already.
                They are sent from where they lie: leave them as they are until the result is there.
            coder: encodes each piece, under its key, as the servers' codec decodes it.

        Returns:
            Done when every holder has acknowledged: it survives the loss of one server then, if there are replicas.
        """
        return self._connections.submit(self._pushes(tensors, clock, coder))

    def push_pull(
        self,
        tensors: Mapping[str, Tensor],
        clock: int,
        coder: Coder | None = None,
        into: Mapping[str, Tensor] | None = None,
    ) -> tuple[Pending[None], Pending[dict[str, Tensor]]]:
        """`push`, and `pull` of the same names at `clock` + 1, piece by piece: values come back while updates leave."""
        pushes = self._pushes(tensors, clock, coder)
        pulls, finish = self._pulls(list(tensors), clock + 1, into)
        self._connections.send([request for pair in zip(pushes, pulls, strict=True) for request in pair])
        return self._connections.pending(pushes), self._connections.pending(pulls, finish)

    def pull(
        self, names: Sequence[str], clock: int, into: Mapping[str, Tensor] | None = None
    ) -> Pending[dict[str, Tensor]]:
        """Fetch values for a worker that has finished `clock` steps.

        Args:
            into: tensors (contiguous, on the CPU) to fill as answers come in; without, new ones are made.

        Returns:
            Tensors by name, the caller's own.
        """
        return self._connections.submit(*self._pulls(names, clock, into))

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
        return self._connections.submit(requests)

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
        return self._connections.submit(requests, lambda: result[0])

    def leave(self) -> None:
        """Tell all servers that this worker pushes no more, so that bsp and ssp do not wait for it."""
        self._ask_all(Operation.LEAVE, "the leave of this worker")

    def status(self) -> dict[int, dict[str, Any]]:
        """What each server that is alive says of itself: keys, size_bytes, updates, waiting, dropped and more."""
        answers = self._ask_all(Operation.STATUS, "its status")
        return {index: answer.document() for index, answer in answers.items()}

    def change_members(self, workers: Sequence[int], clock: int) -> None:
        """Tell all servers which workers train in this client's view, and wait. One worker does it.

        Args:
            clock: the step that they go on from; nothing of an earlier one is missing.
        """
        document = {"epoch": self._config.epoch, "workers": list(workers), "clock": clock}
        self._ask_all(Operation.MEMBERS, "the new members", [("document", text(document))])

    def parts_used(self, first: int) -> list[int]:
        """The parts, numbered from `first` on, that all servers' values have learned from (async)."""
        answers = self._ask_all(Operation.PARTS, "the parts that were used", clock=first)
        found = [set(answer.tensor(0).tolist()) for answer in answers.values()]
        return sorted(set.intersection(*found))

    def is_loaded(self) -> bool:
        """Whether all servers hold all that they should."""
        expected = Counter(holder for _, holders in self._routing.all_keys() for holder in holders)
        return all(status["keys"] >= expected[index] for index, status in self.status().items())

    def clocks(self) -> dict[int, int]:
        """By worker, how many of its steps are in all values (bsp, ssp)."""
        lowest: dict[int, int] = {}
        for status in self.status().values():
            for worker, clock in status["clocks"].items():
                lowest[int(worker)] = min(clock, lowest.get(int(worker), clock))
        return lowest

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
        self._connections.submit(requests).result()
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
        self._connections.submit(requests).result()

    def close(self) -> None:
        """Close all connections; what is under way is lost."""
        self._connections.close()

    def _pushes(self, tensors: Mapping[str, Tensor], clock: int, coder: Coder | None) -> list[Request]:
        requests = []
        for group in self._routing.grouped(tensors, PIECE_BYTES, _MAX_KEYS):
            parts = [(piece.key, self._routing.cut(piece, tensors[piece.parameter])) for piece in group]
            if coder is not None:
                parts = [(key, _encoded(coder, key, update)) for key, update in parts]
            header = self._header(Operation.PUSH, clock, sequence=next(self._sequences))
            requests.append(Request(header, parts, self._routing.holders(group[0]), f"the push of {_names(group)}"))
        return requests

    def _pulls(
        self, names: Sequence[str], clock: int, into: Mapping[str, Tensor] | None
    ) -> tuple[list[Request], Callable[[], dict[str, Tensor]]]:
        """The requests, and what makes the result of their answers."""
        result: dict[str, Tensor] = dict(into) if into is not None else {}
        requests = []
        for group in self._routing.grouped(names, PIECE_BYTES, _MAX_KEYS):
            request = Request(
                self._header(Operation.PULL, clock),
                [(piece.key, _NOTHING) for piece in group],
                self._routing.holders(group[0]),
                f"the pull of {_names(group)}",
            )
            request.arrived = functools.partial(_place, group, self._routing.num_rows, result)
            requests.append(request)

        def finish() -> dict[str, Tensor]:
            self.read_clock = min((r.answer.header.clock for r in requests if r.answer is not None), default=clock)
            return {name: result[name] for name in names}

        return requests, finish

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
            if server is None or server in self._connections.lost:
                continue
            document = {"key": key, "kind": kind, "clock": clock, **more}
            alone = replica is None or {primary, replica} & self._connections.lost.keys()
            document |= {"primary": server == primary or bool(alone)}
            document |= {"replica": replica if server == primary and not alone else None}
            parts = [("document", text(document)), *((name, item.contiguous()) for name, item in tensors.items())]
            requests.append(Request(self._header(Operation.LOAD, clock), parts, (server,), f"the load of {key}"))
        return requests

    def _header(self, operation: Operation, clock: int, sequence: int = 0) -> Header:
        oldest = self._connections.oldest_sequence(sequence)
        flags = IN_NAME if self._config.in_name else 0
        return Header(operation, next(self._numbers), self._config.rank, clock, sequence, oldest, flags)

    def _ask_all(
        self, operation: Operation, what: str, tensors: Sequence[tuple[str, Tensor]] = (), clock: int = 0
    ) -> dict[int, Message]:
        requests = {
            index: Request(self._header(operation, clock), tensors, (index,), what) for index in self._connections.alive
        }
        self._connections.send(list(requests.values()))
        for request in requests.values():
            try:
                self._connections.pending([request]).result()
            except ServerLostError:
                if not (self._config.replicate and self._connections.alive):
                    raise
        return {index: request.answer for index, request in requests.items() if request.answer is not None}


def _first_sequence(config: ClientConfig) -> int:
    """Above all of earlier views; what is brought in a worker's name comes before its own."""
    if not config.epoch:
        return 0
    return (config.epoch << EPOCH_BITS) + (0 if config.in_name else 1 << EPOCH_BITS - 1)


def _encoded(coder: Coder, key: str, update: Tensor) -> Tensor:
    """One piece as bytes, shape (b,); as it is during the codec's warm-up."""
    return coder.encode(key, update.reshape(1, -1))[0] if coder.begin(key) else update


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
