"""Ends a worker whose own work never comes to an end: a data set on a dead file server, a deadlock in the job's code.

Such a worker's heartbeat goes on, on a thread of its own, and so it keeps its place while all others wait for it. Only
this rank can tell that it is not itself one of those who wait. What is watched is therefore the job's code alone, where
nobody is waited for: loading samples, and forward. And the way out of a view that is broken, where all waiting ends:
that one may have much to do on it, a validation say, but not nothing at all.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

_LOOKS_A_LIMIT = 20
_IDLE = 0.002
"""Who uses no more than this part of a processor does nothing but wait."""


class Watch(Protocol):
    """Is told what the main thread does."""

    def begin(self, what: str) -> None:
        """From now on it does `what` by itself."""

    def end(self) -> None:
        """From now on it may well be waiting for others."""


class Endless:
    """Watches nothing."""

    def begin(self, what: str) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""


@dataclass
class _Begun:
    since: float
    what: str


class Patience:
    """Watches the main thread, for the life of the process."""

    def __init__(self, limit_s: float, give_up: Callable[[str, str], None], *, if_idle: bool = False) -> None:
        """Begin to watch.

        Args:
            give_up: called once, on our thread, with what has taken longer than `limit_s`, and where it stands.
            if_idle: only if it used hardly any processor meanwhile: it may well have much to do.
        """
        self._limit_s = limit_s
        self._give_up = give_up
        self._if_idle = if_idle
        self._begun: _Begun | None = None
        threading.Thread(target=self._run, daemon=True, name="shoal-patience").start()

    def begin(self, what: str) -> None:
        """The main thread begins `what`, and waits for nobody. Cheap enough for every step."""
        self._begun = _Begun(time.monotonic(), what)

    def end(self) -> None:
        """It is done."""
        self._begun = None

    def _run(self) -> None:
        worked_s, look_s = 0.0, self._limit_s / _LOOKS_A_LIMIT
        while True:
            time.sleep(look_s)
            worked_s, before_s = _worked_s(), worked_s
            begun = self._begun
            if begun is None:
                continue
            if self._if_idle and worked_s - before_s > _IDLE * look_s:
                begun.since = time.monotonic()
            if time.monotonic() - begun.since > self._limit_s:
                self._give_up(begun.what, stack_of_main_thread())
                return


def _worked_s() -> float:
    """The processor time of the main thread, or where that cannot be told, of the process."""
    ident = threading.main_thread().ident
    if ident is None or not hasattr(time, "pthread_getcpuclockid"):
        return time.process_time()
    return time.clock_gettime(time.pthread_getcpuclockid(ident))


def stack_of_main_thread() -> str:
    """Where the main thread stands, as in a traceback."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return "".join(traceback.format_stack(frame)) if frame is not None else ""


def end_this_process() -> None:
    """Die as if killed: the launcher takes it for a loss, not for a failure of the job."""
    os.kill(os.getpid(), signal.SIGKILL)
