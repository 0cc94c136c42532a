"""A member's side of the coordinator: says hello, sends beats, hands views on; connects again by itself, for ever.

A worker makes one `Attendance` and keeps it for its life. What the worker says (`entered`, `broken`, ...) is kept and
said again on each new connection as long as it holds, so that nothing is lost with a connection or a coordinator.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

from shoal.cluster.membership_events import Waiting
from shoal.cluster.views import Document, View
from shoal.errors import CoordinatorError, RunEnded
from shoal.wire.control import ControlClient

_BEATS_A_LEASE = 4
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 0.5
_MAX_TEXT = 10_000  # characters of a reason: a message too large would be refused, and said again, for ever
_FAREWELL_S = 2.0  # for what has not been delivered when we close


@dataclass(frozen=True, kw_only=True)
class Hello:
    """Who the member is. `member` must be fresh for each process; without a seat the coordinator assigns one."""

    run: str
    member: str
    node: str
    store: str
    fingerprint: dict[str, str | int | float | bool | None] = field(default_factory=dict)
    seat: int | None = None


def _nothing() -> None:
    pass


class Listener:
    """Whom an `Attendance` tells what it hears, at once and on its own thread: each method must be quick.

    This one ignores all of it.
    """

    def on_view(self, view: View) -> None:
        """A new view was decided upon."""

    def on_stop(self) -> None:
        """Training is to end after the step at hand."""

    def on_waiting(self, waiting: Waiting) -> None:
        """There is no view for us until what is waited for has come."""

    def on_contact(self, seat: int, epoch: int, away_s: float) -> None:
        """The coordinator was found, or found again after `away_s` seconds."""

    def on_contact_lost(self, message: str) -> None:
        """The coordinator is away; it is looked for."""


class Attendance:
    """All methods may be called from any thread."""

    def __init__(
        self, connect: Callable[[], ControlClient], hello: Hello, *, lease_s: float, listener: Listener | None = None
    ) -> None:
        """Start to attend, on threads of our own; returns at once.

        Args:
            connect: prepares a connection to the coordinator, which need not be there yet; called for each attempt.
            lease_s: as the coordinator's rules say; a beat is sent four times in that time.

        Raises:
            CoordinatorError: the certificate cannot be read.
        """
        self._hello = hello
        self._beat_s = lease_s / _BEATS_A_LEASE
        # After a restart of the coordinator we have one lease to come back in.
        self._longest_pause_s = min(_LONGEST_PAUSE_S, lease_s / 8)
        self._listener = listener or Listener()
        self._connect = connect
        self._client = connect()
        self._changed = threading.Condition()
        self._queue: deque[Document] = deque()
        self._said: dict[str, Document] = {}  # by kind: what holds, and is said again on a new connection
        self._progress = (0, -1)
        self._attempt = 0
        self._seat: int | None = None
        self._refusal: CoordinatorError | None = None
        self._end: RunEnded | None = None
        self._heard_at = time.monotonic()
        self._connected = self._closing = False
        self.latest: View | None = None
        """The newest view."""
        self.waiting: Waiting | None = None
        """What the coordinator last said that we wait for; None once a view came."""
        self._thread = threading.Thread(target=self._run, daemon=True, name="shoal-attendance")
        self._thread.start()

    @property
    def ended(self) -> str | None:
        """Why the run ended, once the coordinator said so."""
        return str(self._end) if self._end else None

    @property
    def lost_contact_s(self) -> float:
        """Seconds since the coordinator was last heard; 0 while connected."""
        return 0.0 if self._connected else time.monotonic() - self._heard_at

    def wait_welcome(self, timeout_s: float) -> int:
        """Wait until the coordinator lets us in. Returns our seat.

        Raises:
            CoordinatorError: it refused, or cannot be reached within `timeout_s`.
            RunEnded: the run is over.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._seat is not None or self._is_over(), timeout_s)
            self._raise_end()
            if self._seat is None:
                told = f" ({worded(self.waiting)})" if self.waiting else ""
                address = self._client.address
                raise CoordinatorError(
                    f"the coordinator at {address} did not let us in within {timeout_s:.0f} s{told}: is it running, "
                    "and does a firewall stand between?"
                )
            return self._seat

    def next_view(self, after_epoch: int, timeout_s: float | None = None) -> View | None:
        """Wait for a view newer than `after_epoch` and return the newest; None if none comes within `timeout_s`.

        Raises:
            CoordinatorError: the coordinator refused us.
            RunEnded: the run is over.
        """

        def newer() -> View | None:
            return self.latest if self.latest is not None and self.latest.epoch > after_epoch else None

        with self._changed:
            self._changed.wait_for(lambda: newer() or self._is_over(), timeout_s)
            self._raise_end()
            return newer()

    def progress(self, epoch: int, step: int) -> None:
        """Note the view trained in and the committed steps held, for the next beat. Cheap enough for every step."""
        self._progress = (epoch, step)

    def entered(self, epoch: int) -> None:
        """We have switched to view `epoch`, and are connected there."""
        with self._changed:
            self._said.pop("broken", None)
        self._say("entered", epoch=epoch)

    def broken(self, epoch: int, reason: str) -> None:
        """An exchange failed in view `epoch`; we wait for a new one."""
        self._say("broken", epoch=epoch, reason=reason[:_MAX_TEXT])

    def leaving(self) -> None:
        """We want to hand over and go."""
        self._say("leaving")

    def finished(self, reason: str) -> None:
        """Training has come to its end."""
        self._say("finished", reason=reason[:_MAX_TEXT])

    def failed(self, message: str) -> None:
        """We failed by our own fault, and the whole run must end."""
        self._say("failed", message=message[:_MAX_TEXT])

    def close(self) -> None:
        """Deliver what was said, if the coordinator is there, and go. Idempotent."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is threading.current_thread():
            return
        self._thread.join(_FAREWELL_S)
        self._client.cancel()
        self._thread.join(_FAREWELL_S)

    def __enter__(self) -> Attendance:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _raise_end(self) -> None:
        if self._end is not None:
            raise RunEnded(str(self._end), failed=self._end.failed)
        if self._refusal is not None:
            raise CoordinatorError(str(self._refusal), refused=self._refusal.refused)

    def _say(self, kind: str, **fields: object) -> None:
        with self._changed:
            document = {"kind": kind, **fields}
            self._said[kind] = document
            self._queue.append(document)
            self._changed.notify_all()

    def _run(self) -> None:
        """Attend until closed, refused or at the run's end."""
        pause_s = _FIRST_PAUSE_S
        try:
            while True:
                pause_s = _FIRST_PAUSE_S if self._attend() else min(self._longest_pause_s, 2 * pause_s)
                self._client.close()
                with self._changed:
                    if self._changed.wait_for(self._is_over, pause_s):
                        return
                self._client = self._connect()
        except Exception as error:  # else those who wait for a view would wait for ever
            self._refuse(CoordinatorError(f"attendance ended by a mistake: {error!r}"))
            raise

    def _attend(self) -> bool:
        """One connection, from hello to its end. Returns whether the coordinator answered."""
        with self._changed:
            self._attempt += 1
            documents = self._documents(self._attempt)
        try:
            for document in self._client.attend(documents):
                self._take(document)
            message = "it ended the connection"
        except CoordinatorError as error:
            message = str(error)
            if error.refused:
                self._refuse(error)
        with self._changed:
            was_connected, self._connected = self._connected, False
            self._heard_at = time.monotonic() if was_connected else self._heard_at
            self._attempt += 1  # which ends `documents`
            self._changed.notify_all()
        if was_connected and not self._is_over():
            self._listener.on_contact_lost(message)
        return was_connected

    def _is_over(self) -> bool:
        return self._closing or self._refusal is not None or self._end is not None

    def _documents(self, attempt: int) -> Iterator[Document]:
        """What to send on one connection. Runs on a thread of the transport's."""
        with self._changed:
            epoch, step = self.latest.epoch if self.latest else 0, self._progress[1]
            seat = self._hello.seat if self._seat is None else self._seat
            self._queue = deque(self._still_holds(epoch))
        yield {"kind": "hello", **asdict(self._hello), "seat": seat, "epoch": epoch, "step": step}
        while True:
            with self._changed:
                spoke = self._changed.wait_for(
                    lambda: self._queue or self._closing or self._attempt != attempt, self._beat_s
                )
                if self._attempt != attempt or (self._closing and not self._queue):
                    return
                epoch, step = self._progress
                document = self._queue.popleft() if spoke else {"kind": "beat", "epoch": epoch, "step": step}
            yield document

    def _still_holds(self, epoch: int) -> list[Document]:
        """What was said and is not out of date with view `epoch`: a planned view leaves the one before it open."""
        return [d for d in self._said.values() if d.get("epoch", epoch) >= epoch - (d["kind"] == "broken")]

    def _take(self, document: Document) -> None:
        """Follow what the coordinator says, and tell the listener of it once nothing is locked any more."""
        tell: Callable[[], None] = _nothing
        with self._changed:
            away_s, self._heard_at = self.lost_contact_s, time.monotonic()
            match document:
                case {"kind": "welcome", "seat": int(seat), "epoch": int(epoch)}:
                    self._seat, self._connected, self.waiting = seat, True, None
                    tell = functools.partial(self._listener.on_contact, seat, epoch, away_s)
                case {"kind": "refused", "reason": str(reason)}:
                    self._refusal = CoordinatorError(f"the coordinator refused us: {reason}", refused=True)
                case {
                    "kind": "waiting",
                    "what": str(what),
                    "reason": str(reason),
                    "have": int(have),
                    "need": int(need),
                }:
                    self.waiting = Waiting(what, reason, have, need)
                    tell = functools.partial(self._listener.on_waiting, self.waiting)
                case {"kind": "view", "view": plain}:
                    view = View.from_plain(plain)
                    if self.latest is None or view.epoch > self.latest.epoch:
                        self.latest, self.waiting = view, None
                        tell = functools.partial(self._listener.on_view, view)
                case {"kind": "stop"}:
                    tell = self._listener.on_stop
                case {"kind": "end", "reason": str(reason), "failed": bool(failed)}:
                    self._end = RunEnded(reason, failed=failed)
                case _:
                    raise CoordinatorError(f"got {str(document)[:200]} from the coordinator: is it of this version?")
            self._changed.notify_all()
        tell()

    def _refuse(self, error: CoordinatorError) -> None:
        with self._changed:
            self._refusal = self._refusal or error
            self._changed.notify_all()


def worded(waiting: Waiting) -> str:
    """What is waited for, and how many are here of how many."""
    return waiting.reason + (f"; {waiting.have} are here, {waiting.need} are needed" if waiting.need else "")
