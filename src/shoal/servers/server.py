"""A parameter server: one thread that takes updates and answers pulls, message by message.

ZeroMQ's threads move the bytes meanwhile. Since one thread does all the work on one key after the other, a reader never
sees half an update of a key. What does not make sense is refused with a reason, what is no frame is dropped and
counted; neither ends the server.

Fail-over: a worker that lost the primary comes to the replica, which from then on answers for these keys alone, and
tells the old primary so if that should still be alive (it then answers `MOVED`, acknowledging nothing more). Two
servers that live but cannot reach each other, while workers reach both, are beyond this protocol: there, a coordinator
has to decide who is lost.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import zmq
from torch import Tensor

from shoal.job.sparse_rows import TableSpec
from shoal.servers.dense import DensePiece, OptimizerFactory, ScheduleFactory
from shoal.servers.holding import Holding, RefusalError
from shoal.servers.ledger import Ledger
from shoal.servers.replication import Replicas, refused
from shoal.servers.table import TableShard
from shoal.strategy.codec import Codec
from shoal.strategy.sync.staleness import Mode, Staleness
from shoal.wire.blocks import keep_large_blocks
from shoal.wire.bulk import MAX_MESSAGE_BYTES, Listener
from shoal.wire.frame import EPOCH_BITS, FORWARDED, FrameError, Header, Message, Operation, text
from shoal.wire.secrets import Secrets

_TICK_MS = 100
_BATCH = 16  # requests between two looks at the replicas
Log = Callable[..., None]


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """One server.

    Attributes:
        index: its place among the servers, from 0.
        workers: the ranks that bsp and ssp wait for.
        mode, bound: how stale a worker may read, see `strategy.sync.staleness`.
        address: where to listen; port `*` lets the system choose.
        secrets: keys for encryption and authentication, or None for an open port.
        lost_after_s: a replica without a connection for longer is given up.
        max_message_bytes: the largest tensor taken in one message.
    """

    index: int
    workers: tuple[int, ...]
    mode: Mode = "bsp"
    bound: int = 0
    address: str = "tcp://127.0.0.1:*"
    secrets: Secrets | None = None
    lost_after_s: float = 3.0
    max_message_bytes: int = MAX_MESSAGE_BYTES


@dataclass(slots=True, eq=False)
class _Waiting:
    """A pull that waits for some of its keys."""

    identity: bytes
    message: Message
    keys: list[str]
    missing: set[str] = field(default_factory=set)
    answered: bool = False


class Server:
    """Bound when constructed, at work while in `serve`."""

    def __init__(
        self,
        config: ServerConfig,
        optimizer: OptimizerFactory,
        *,
        schedule: ScheduleFactory | None = None,
        codec: Codec | None = None,
        log: Log = lambda kind, **fields: None,
        on_members: Callable[[int], None] = lambda number: None,
    ) -> None:
        """Listen at `config.address`; `address` then says where.

        Args:
            optimizer: makes the optimizer of one dense parameter (or a piece of one); called once for each.
            schedule: makes its learning-rate schedule.
            codec: how workers may encode their updates.
            log: called as `log(kind, **fields)`: replica_lost (server), promoted (key), moved (key), frame_dropped
                (reason), server_failed (message), members (epoch, workers, clock). `EventLog.write` fits.
            on_members: called with the number of workers when they change.

        Raises:
            RendezvousError: the address cannot be bound.
        """
        keep_large_blocks()
        self._config = config
        self._optimizer = optimizer
        self._schedule = schedule
        self._codec = codec
        self._log = log
        self._holdings: dict[str, Holding] = {}
        self._waiting: set[_Waiting] = set()
        self._ledger = Ledger()
        self._epoch = 0
        self._workers = config.workers
        self._on_members = on_members
        self._stopped = False
        self._listener = Listener(
            config.address,
            secrets=config.secrets,
            max_message_bytes=config.max_message_bytes,
            on_drop=lambda reason: log("frame_dropped", reason=reason),
        )
        self._replicas = Replicas(
            secrets=config.secrets,
            max_message_bytes=config.max_message_bytes,
            lost_after_s=config.lost_after_s,
            on_lost=self._replica_lost,
        )

    @property
    def address(self) -> str:
        """Where it listens, `tcp://HOST:PORT`."""
        return self._listener.address

    def stop(self) -> None:
        """Let `serve` return within a tenth of a second; may be called from a signal handler or another thread."""
        self._stopped = True

    def serve(self, addresses: Sequence[str]) -> None:
        """Work until `stop` or a client's stop. `addresses` are those of all servers, in order."""
        self._replicas.know(addresses)
        try:
            while not self._stopped:
                sockets: list[Any] = [self._listener.socket, *self._replicas.sockets]
                zmq.select(sockets, [], [], _TICK_MS / 1000)
                self._replicas.attend()
                for _ in range(_BATCH):
                    request = self._listener.receive()
                    if request is None:
                        break
                    self._handle(*request)
        finally:
            self._replicas.close()
            self._listener.close()

    def _handle(self, identity: bytes, message: Message) -> None:
        try:
            self._dispatch(identity, message)
        except FrameError as error:
            self._listener.drop(str(error))
        except RefusalError as error:
            self._refuse(identity, message.header, str(error))
        except Exception as error:  # a user's optimizer may raise anything: the worker is told, the others go on
            self._log("server_failed", message=f"{type(error).__name__}: {error}")
            self._refuse(identity, message.header, f"the server failed: {type(error).__name__}: {error}")

    def _dispatch(self, identity: bytes, message: Message) -> None:
        match message.header.operation:
            case Operation.PUSH | Operation.PUSH_ROWS:
                self._push(identity, message)
            case Operation.PULL | Operation.PULL_ROWS:
                self._pull(identity, message)
            case Operation.LOAD:
                self._load(message)
                self._reply(identity, message.header)
            case Operation.DUMP:
                self._dump(identity, message)
            case Operation.LEAVE:
                for holding in self._holdings.values():
                    holding.leave(message.header.rank, functools.partial(self._fresh, holding))
                self._reply(identity, message.header)
            case Operation.MEMBERS:
                self._change_members(identity, message)
            case Operation.PARTS:
                parts = self._ledger.whole(message.header.clock, len(self._holdings))
                self._reply(identity, message.header, [("parts", torch.tensor(parts, dtype=torch.int64))])
            case Operation.STATUS:
                self._reply(identity, message.header, [("status", text(self._status()))])
            case Operation.STOP:
                self._stopped = True
                self._reply(identity, message.header)
            case other:
                raise FrameError(f"{other.name} is an answer, not a request")

    def _push(self, identity: bytes, message: Message) -> None:
        header, updates = message.header, _updates(message)
        if header.sequence >> EPOCH_BITS < self._epoch and not header.flags & FORWARDED:
            self._reply(identity, header, operation=Operation.OUTDATED)
            return
        holdings = [self._holding(key) for key in updates]
        for holding, (key, update) in zip(holdings, list(updates.items()), strict=True):
            if isinstance(holding.shard, DensePiece) and isinstance(update, Tensor):
                updates[key] = holding.shard.decoded(update)
        if any(self._moved(holding, header) for holding in holdings):
            self._reply(identity, header, operation=Operation.MOVED)
            return
        for holding, update in zip(holdings, updates.values(), strict=True):
            holding.check(update)
        replicas = {holding.replica for holding in holdings}
        if len(replicas) > 1:
            raise RefusalError(f"keys of different replicas in one push: {', '.join(updates)}")
        replica = next(iter(replicas), None)
        for holding, update in zip(holdings, updates.values(), strict=True):
            answer = functools.partial(self._fresh, holding)
            if holding.take(header, update, answer) and self._epoch and self._config.mode == "async":
                self._ledger.note(header.clock)
        if replica is None or header.flags & FORWARDED:
            self._reply(identity, header)
            return
        tensors = [(entry.name, message.tensor(index)) for index, entry in enumerate(message.entries)]
        self._replicas.forward(
            replica, header, tensors, functools.partial(self._replicated, identity, header, holdings)
        )

    def _replicated(self, identity: bytes, header: Header, holdings: list[Holding], answer: Message | None) -> None:
        if answer is not None and answer.header.operation == Operation.MOVED:
            for holding in holdings:
                self._step_down(holding)
            self._reply(identity, header, operation=Operation.MOVED)
        elif reason := refused(answer):
            self._refuse(identity, header, f"the replica refused: {reason}")
        else:
            self._reply(identity, header)

    def _pull(self, identity: bytes, message: Message) -> None:
        keys = list(dict.fromkeys(entry.name for entry in message.entries))
        holdings = [self._holding(key) for key in keys]
        if any(self._moved(holding, message.header) for holding in holdings):
            self._reply(identity, message.header, operation=Operation.MOVED)
            return
        if message.header.operation == Operation.PULL_ROWS:
            self._table(keys[0]).check_ids(message.tensor(0))
        pull = _Waiting(identity, message, keys, set(keys))
        self._waiting.add(pull)
        for holding in holdings:
            holding.ask(message.header.clock, pull, functools.partial(self._fresh, holding))

    def _fresh(self, holding: Holding, pull: _Waiting) -> None:
        """`holding` is fresh enough for `pull`, which is answered when all its keys are."""
        pull.missing.discard(holding.key)
        if pull.missing or pull not in self._waiting:
            return
        self._waiting.discard(pull)
        header = pull.message.header
        if header.operation == Operation.PULL_ROWS:
            rows = self._table(holding.key).read(pull.message.tensor(0))
            self._reply(pull.identity, header, [(holding.key, rows)])
            return
        pieces = [self._dense(key) for key in pull.keys]
        answer = [(key, piece.read()) for key, piece in zip(pull.keys, pieces, strict=True)]
        applied = min(self._holding(key).staleness.applied_clock for key in pull.keys)
        trackers = self._reply(pull.identity, header, answer, clock=applied)
        for piece in pieces:
            piece.sent(trackers)

    def _load(self, message: Message) -> None:
        document, tensors = _document(message), message.tensors()
        key = str(document["key"])
        shard: DensePiece | TableShard
        if document["kind"] == "table":
            shard = TableShard(TableSpec(**document["table"]))
        else:
            shard = DensePiece(tensors["value"].clone(), self._optimizer, self._schedule, self._codec)
        if document.get("state") is not None:
            shard.restore(document["state"], {name: item for name, item in tensors.items() if name != "document"})
        config = self._config
        staleness = Staleness(config.mode, self._workers, bound=config.bound, start_clock=int(document["clock"]))
        self._holdings[key] = Holding(key, shard, staleness, bool(document["primary"]), document["replica"])

    def _dump(self, identity: bytes, message: Message) -> None:
        holding = self._holding(message.entries[0].name)
        state, tensors = holding.shard.dump()
        document = {"key": holding.key, "state": state, "clock": holding.staleness.applied_clock}
        if isinstance(holding.shard, TableShard):
            document |= {"kind": "table", "table": holding.shard.spec.document()}
        else:
            document |= {"kind": "dense"}
        self._reply(identity, message.header, [("document", text(document)), *tensors.items()])

    def _status(self) -> dict[str, Any]:
        return {
            "index": self._config.index,
            "mode": self._config.mode,
            "keys": len(self._holdings),
            "primary_keys": sum(holding.primary and not holding.moved for holding in self._holdings.values()),
            "size_bytes": sum(holding.shard.size_bytes for holding in self._holdings.values()),
            "updates": {key: holding.shard.version for key, holding in self._holdings.items()},
            "waiting": len(self._waiting),
            "epoch": self._epoch,
            "clocks": self._clocks(),
            "dropped": self._listener.dropped,
        }

    def _clocks(self) -> dict[int, int]:
        """By worker, how many of its steps are in the values of all keys."""
        lowest: dict[int, int] = {}
        for holding in self._holdings.values():
            for worker, clock in holding.staleness.clocks.items():
                lowest[worker] = min(clock, lowest.get(worker, clock))
        return lowest

    def _change_members(self, identity: bytes, message: Message) -> None:
        document = message.document()
        epoch, workers = int(document["epoch"]), [int(worker) for worker in document["workers"]]
        if epoch < self._epoch:
            self._reply(identity, message.header, operation=Operation.OUTDATED)
            return
        if epoch > self._epoch:  # else this is said again
            # In async nobody is waited for, and what stands for a clock is none.
            self._epoch, self._workers = epoch, () if self._config.mode == "async" else tuple(workers)
            self._waiting.clear()
            for holding in self._holdings.values():
                holding.change_members(self._workers, int(document["clock"]))
            self._on_members(len(workers))
            self._log("members", epoch=epoch, workers=workers, clock=document["clock"])
        self._reply(identity, message.header)

    def _moved(self, holding: Holding, header: Header) -> bool:
        """Whether this server must not answer for `holding`; a worker that asks a replica makes it the primary."""
        if header.flags & FORWARDED:
            return holding.primary
        if not holding.primary and not holding.moved:
            holding.primary, holding.replica = True, None
            self._log("promoted", key=holding.key)
        return holding.moved

    def _step_down(self, holding: Holding) -> None:
        if holding.moved:
            return
        holding.moved = True
        self._log("moved", key=holding.key)
        for pull in [pull for pull in self._waiting if holding.key in pull.missing]:
            self._waiting.discard(pull)
            self._reply(pull.identity, pull.message.header, operation=Operation.MOVED)

    def _replica_lost(self, index: int) -> None:
        self._log("replica_lost", server=index)
        for holding in self._holdings.values():
            if holding.replica == index:
                holding.replica = None

    def _holding(self, key: str) -> Holding:
        if key not in self._holdings:
            raise RefusalError(f"server {self._config.index} does not hold '{key}': load it first")
        return self._holdings[key]

    def _table(self, key: str) -> TableShard:
        shard = self._holding(key).shard
        if not isinstance(shard, TableShard):
            raise RefusalError(f"'{key}' is a dense parameter, not a sparse table")
        return shard

    def _dense(self, key: str) -> DensePiece:
        shard = self._holding(key).shard
        if not isinstance(shard, DensePiece):
            raise RefusalError(f"'{key}' is a sparse table: pull its rows")
        return shard

    def _reply(
        self,
        identity: bytes,
        header: Header,
        tensors: Sequence[tuple[str, Tensor]] = (),
        *,
        operation: Operation = Operation.DONE,
        clock: int = 0,
    ) -> list[Any]:
        return self._listener.send(identity, Header(operation, request=header.request, clock=clock), tensors)

    def _refuse(self, identity: bytes, header: Header, reason: str) -> None:
        self._reply(identity, header, [("text", text(reason))], operation=Operation.REFUSED)


def _updates(message: Message) -> dict[str, Any]:
    """Key -> update: a tensor each for dense keys; for a table, one pair (ids, gradients)."""
    if message.header.operation == Operation.PUSH:
        return message.tensors()
    if len(message.entries) != 2:
        raise FrameError(f"a push of rows has {len(message.entries)} tensors, expected ids and gradients")
    return {message.entries[1].name: (message.tensor(0), message.tensor(1))}


def _document(message: Message) -> dict[str, Any]:
    document = message.document() if message.entries else None
    if not isinstance(document, dict) or not {"key", "kind", "primary", "replica", "clock"} <= document.keys():
        raise FrameError("a load without a document of key, kind, primary, replica and clock")
    return document
