"""The coordinator's process: `python -m shoal.cluster.coordinator CONFIG.json`, started by a launcher.

It serves the state machine of `membership` to the members over gRPC, on one thread: what they say becomes events, and
its instructions are followed in order, records first made durable. Killed at any moment, it can be started again on
the same log. It prints nothing, tells its address in a file, and ends at once when its launcher does
(SHOAL_CONTROL=stdin, as for workers).
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from shoal.cluster.journal import Journal
from shoal.cluster.membership import Membership
from shoal.cluster.membership_events import (
    Close,
    Disconnected,
    Ended,
    Event,
    Instruction,
    Record,
    Rules,
    Send,
    StopAsked,
    Tick,
    event_of,
)
from shoal.cluster.views import Document, checked
from shoal.errors import CoordinatorError, ShoalError
from shoal.run import write_atomic
from shoal.strict_toml import STRICT
from shoal.wire.control import ControlServer, Stream
from shoal.wire.tls import ServerTls

_TICKS_A_LEASE = 50
_STDIN = 0


@dataclass(frozen=True, kw_only=True)
class CoordinatorConfig:
    """What the process is started with, as a JSON file that only its owner should be able to read.

    `listen` is `HOST:PORT`, port 0 lets the system choose; `address_file` is then written: `{"address": "HOST:PORT"}`.
    With `certificate` and `key` (PEM files) members are talked to over TLS.
    """

    __pydantic_config__: ClassVar = STRICT
    rules: Rules
    token: str
    listen: str
    log: str
    address_file: str
    certificate: str | None = None
    key: str | None = None


class Coordinator:
    """Connects streams, state machine and journal. All on one thread."""

    def __init__(self, config: CoordinatorConfig) -> None:
        """Take the log.

        Raises:
            CoordinatorError: another coordinator has it, or it is damaged.
        """
        self._config = config
        self._journal = Journal(Path(config.log))
        self._membership = Membership(config.rules, now=time.monotonic())
        self._server = ControlServer(self._attend, self._ask, token=config.token)
        self._streams: dict[str, Stream] = {}
        self._events: list[Event] = []
        self._stopped = False

    async def serve(self) -> None:
        """Listen, go on from the log, and work until cancelled.

        Raises:
            CoordinatorError: the address is taken, the log is another run's, or it cannot be written any more.
        """
        config = self._config
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        tls = (
            ServerTls(certificate=Path(config.certificate), key=Path(config.key or "")) if config.certificate else None
        )
        address = self._server.bind(config.listen, tls=tls)
        self._membership.restore(self._journal.records, time.monotonic())  # from here on members can come back
        await self._server.start()
        write_atomic(Path(config.address_file), json.dumps({"address": address}).encode(), mode=0o600)
        try:
            while not self._failure.done():
                self._take(Tick())
                await asyncio.wait((self._failure,), timeout=config.rules.lease_s / _TICKS_A_LEASE)
            self._failure.result()
        finally:
            self._stopped = True  # that the streams end now is our own doing
            await self._server.stop()
            self._journal.close()

    async def _attend(self, stream: Stream) -> None:
        """One connection of a member, from its hello to its end."""
        member = ""
        try:
            while (document := await stream.receive()) is not None:
                event = event_of(document, member or None)
                if not member:
                    member = event.member
                    self._connect(member, stream)
                if self._streams.get(member) is stream:
                    self._take(event)
        except CoordinatorError as error:
            stream.send({"kind": "refused", "reason": str(error)})
        finally:
            if member and self._streams.get(member) is stream:
                del self._streams[member]
                self._take(Disconnected(member=member))

    def _connect(self, member: str, stream: Stream) -> None:
        """From now on `stream` is the member's: an earlier one may have broken without our knowing yet."""
        earlier = self._streams.get(member)
        if earlier is not None:
            earlier.close()
        self._streams[member] = stream

    def _ask(self, document: Document) -> Document:
        match document.pop("ask", None):
            case "status":
                return self._membership.status()
            case "ended":
                self._take(checked(Ended, document, what="'ended'"))
                return {}
            case "stop":
                self._take(StopAsked())
                return {}
            case other:
                raise CoordinatorError(f"got the question {other!r}, expected 'status', 'ended' or 'stop'")

    def _take(self, event: Event) -> None:
        """Note what happened; what happens in the same moment is decided on together."""
        if self._stopped:
            return
        if not self._events:
            asyncio.get_running_loop().call_soon(self._work)
        self._events.append(event)

    def _work(self) -> None:
        if self._stopped:
            return
        events, self._events = self._events, []
        try:
            self._follow(self._membership.handle(events, time.monotonic()))
        except Exception as error:  # nobody may act on what is not on disk, or on half of a decision
            self._stopped = True
            self._failure.set_exception(error)

    def _follow(self, instructions: Iterable[Instruction]) -> None:
        instructions = list(instructions)
        records = [instruction.document for instruction in instructions if isinstance(instruction, Record)]
        if records:
            self._journal.append(records)
        for instruction in instructions:
            match instruction:
                case Send(member, document) if member in self._streams:
                    self._streams[member].send(document)
                case Close(member) if member in self._streams:
                    self._streams.pop(member).close()


def main() -> None:
    """Run the coordinator of one run until its launcher ends, or it is killed."""
    if os.environ.get("SHOAL_CONTROL") == "stdin":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=_end_with_the_launcher, daemon=True, name="shoal-control").start()
    code = 0
    try:
        asyncio.run(Coordinator(load_config(Path(sys.argv[1]))).serve())
    except KeyboardInterrupt:
        pass
    except ShoalError as error:
        print(error, file=sys.stderr, flush=True)
        code = 1
    except Exception:
        traceback.print_exc()
        code = 1
    os._exit(code)


def load_config(path: Path) -> CoordinatorConfig:
    """Read the file that the process was started with.

    Raises:
        CoordinatorError: it cannot be read, or is no configuration.
    """
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CoordinatorError(f"cannot read the coordinator's configuration {path}: {error}") from None
    return checked(CoordinatorConfig, document, what="a coordinator's configuration")


def _end_with_the_launcher() -> None:
    while os.read(_STDIN, 4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
