"""The processes of a run, as any supervisor starts and ends them.

Workers live in sessions of their own, so that a Ctrl-C reaches only the supervisor, which asks them for a clean stop.
Each holds our pipe as its standard input and ends at once when the pipe does: nothing outlives the launcher, not even
one that was killed by `kill -9`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType


def open_process(
    command: Sequence[str], env: Mapping[str, str], log: Path, handed: int | None = None
) -> subprocess.Popen[bytes]:
    """Start a process whose output goes to the end of `log`; `handed`: a descriptor that it inherits."""
    with log.open("ab") as output:
        return subprocess.Popen(
            list(command),
            env=dict(env),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(handed,) if handed is not None else (),
        )


def tell(process: subprocess.Popen[bytes], line: str) -> None:
    """Write a line to a process's standard input; it may have ended already."""
    with contextlib.suppress(BrokenPipeError, ValueError):
        if process.stdin is not None:
            process.stdin.write(line.encode() + b"\n")
            process.stdin.flush()


def ask_to_stop(process: subprocess.Popen[bytes]) -> None:
    """Ask a worker to stop after the step at hand."""
    tell(process, "stop")


def kill_group(pid: int) -> None:
    """Kill a process and all that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def collect(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a process and its children, and let go of it."""
    if process.poll() is None:
        kill_group(process.pid)
    process.wait()
    kill_group(process.pid)  # a data loader's process, say, whose parent is gone
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


@contextlib.contextmanager
def signals(on_signal: Callable[[], None]) -> Iterator[None]:
    """While it lasts, Ctrl-C, SIGTERM and a closed terminal call `on_signal`; only the main thread can ask for that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(_: int, __: FrameType | None) -> None:
        on_signal()

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
