"""Slows a running process, or stops it, from outside: by SIGSTOP and SIGCONT to its whole process group.

It needs no rights beyond sending signals, so it works wherever a worker is a local process. A slowed process may run
for a part of each short period, which is the speed of a slower machine as long as nobody looks closer than that.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time

_PERIOD_S = 0.02
_LEAST_RUN_S = 0.002
"""Shorter turns than this cannot be kept; a slower process has longer periods instead."""

_RELEASE = 'read -r _; kill -CONT "$1" 2>/dev/null; true'


class Brake:
    """Holds one process back. Release it with `set_share(1.0)`; it is released too when this process dies."""

    def __init__(self, pid: int) -> None:
        """Take hold of the process `pid`, or of its whole group where it leads one; nothing happens to it yet."""
        self.pid = pid
        self._share = 1.0
        self._is_leader = _is_leader(pid)
        self._turns: _Turns | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    def set_share(self, share: float) -> None:
        """Let the process run for this part of the time from now on: 0 stops it, 1 releases it.

        A process that has ended is let be.
        """
        if share == self._share:
            return
        if self._turns is not None:
            self._turns.end()
            self._turns = None
        self._share = share
        if share >= 1:
            self._send(signal.SIGCONT)
            self._dismiss_guard()
            return
        self._post_guard()
        if share <= 0:
            self._send(signal.SIGSTOP)
        else:
            self._turns = _Turns(self, share)

    def _send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            (os.killpg if self._is_leader else os.kill)(self.pid, number)

    def _post_guard(self) -> None:
        """A stopped worker cannot see that its launcher was killed: a process that sees it lets the worker go on."""
        if self._guard is None:
            target = f"-{self.pid}" if self._is_leader else str(self.pid)
            self._guard = subprocess.Popen(
                ["sh", "-c", _RELEASE, "sh", target],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )

    def _dismiss_guard(self) -> None:
        if self._guard is not None:
            self._guard.communicate()  # closes its input, and waits
            self._guard = None


class _Turns:
    """A thread that stops a process and lets it go on, in turns; the process runs when it ends."""

    def __init__(self, brake: Brake, share: float) -> None:
        self._brake = brake
        self._share = share
        self._ended = threading.Event()
        brake._send(signal.SIGCONT)
        self._thread = threading.Thread(target=self._take, daemon=True, name=f"brake-{brake.pid}")
        self._thread.start()

    def end(self) -> None:
        self._ended.set()
        self._thread.join()

    def _take(self) -> None:
        """What a turn took too long is made up for in the next, so that the share holds on a busy machine."""
        turn_s = max(_LEAST_RUN_S, _PERIOD_S * self._share)
        stopped_for_running = (1 - self._share) / self._share
        owed_s = 0.0
        while not self._ended.is_set():
            ran_s = min(self._wait(turn_s + owed_s), 5 * turn_s)
            self._brake._send(signal.SIGSTOP)
            asked_s = ran_s * stopped_for_running
            late_s = self._wait(asked_s) - asked_s
            self._brake._send(signal.SIGCONT)
            owed_s = min(max(late_s, 0.0) / stopped_for_running, 4 * turn_s)

    def _wait(self, duration_s: float) -> float:
        begin = time.monotonic()
        self._ended.wait(duration_s)
        return time.monotonic() - begin


def _is_leader(pid: int) -> bool:
    try:
        return os.getpgid(pid) == pid
    except ProcessLookupError:
        return False
