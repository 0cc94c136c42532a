"""How a worker hears from whoever started it: "stop" on its standard input, or SIGTERM; and an end of input, which
means that the launcher is gone.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Mapping

_STDIN = 0


class StopRequest:
    """Whether somebody asked this worker to stop after the step at hand.

    Attributes:
        on_flip: called when a rehearsal asks for a byte of the next message to be changed.
    """

    def __init__(self) -> None:
        self._event = threading.Event()
        self.on_flip: Callable[[], None] = lambda: None

    def __bool__(self) -> bool:
        return self._event.is_set()

    def set(self, *_: object) -> None:
        """Ask."""
        self._event.set()


def listen(env: Mapping[str, str]) -> StopRequest:
    """Start to listen, on a thread of its own where a launcher holds our standard input (SHOAL_CONTROL=stdin).

    A worker must not outlive its launcher: at the end of input the process ends at once.
    """
    request = StopRequest()
    signal.signal(signal.SIGTERM, request.set)
    if env.get("SHOAL_CONTROL") == "stdin":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=_watch, args=(request,), daemon=True, name="shoal-control").start()
    else:
        signal.signal(signal.SIGINT, request.set)
    return request


def _watch(request: StopRequest) -> None:
    # Not by way of sys.stdin: a forked loader process closes that, and would wait for its lock for ever.
    while data := os.read(_STDIN, 4096):
        if b"stop" in data:
            request.set()
        if b"flip" in data:
            request.on_flip()
    os.killpg(0, signal.SIGKILL)  # our session: this process and the loader processes it forked
