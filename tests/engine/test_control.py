"""A worker hears "stop", hears SIGTERM, and does not outlive its launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

WORKER = """
import os, sys, time
from shoal.engine import control
request = control.listen(os.environ)
print("listening", flush=True)
while not request:
    time.sleep(0.01)
print("stopping", flush=True)
time.sleep(60)
"""
FORKER = """
import os, sys, time
from shoal.engine import control
control.listen(os.environ)
time.sleep(0.2)
child = os.fork()
if child == 0:
    sys.stdin.close()  # as multiprocessing does in a forked process
    print(os.getpid(), flush=True)
time.sleep(60)
"""


@contextmanager
def worker(code: str = WORKER, *, control: bool = True) -> Iterator[subprocess.Popen[str]]:
    """A worker in a session of its own, as the launcher starts it."""
    env = {key: value for key, value in os.environ.items() if key != "SHOAL_CONTROL"}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env | ({"SHOAL_CONTROL": "stdin"} if control else {}),
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def say(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdin is not None
    process.stdin.write(text)
    process.stdin.flush()


def running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_the_word_stop_asks_for_a_stop() -> None:
    with worker() as process:
        assert line(process) == "listening"
        say(process, "stop\n")
        assert line(process) == "stopping"
        assert process.poll() is None


def test_other_words_are_passed_over() -> None:
    with worker() as process:
        assert line(process) == "listening"
        say(process, "hello\n\n")
        time.sleep(0.2)
        say(process, "stop\n")
        assert line(process) == "stopping"


@pytest.mark.parametrize("control", [True, False])
def test_sigterm_asks_for_a_stop(control: bool) -> None:
    with worker(control=control) as process:
        assert line(process) == "listening"
        process.send_signal(signal.SIGTERM)
        assert line(process) == "stopping"


def test_ctrl_c_is_the_launchers_business_where_there_is_one() -> None:
    with worker() as process:
        assert line(process) == "listening"
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None
        say(process, "stop\n")
        assert line(process) == "stopping"


def test_ctrl_c_asks_for_a_stop_where_there_is_no_launcher() -> None:
    with worker(control=False) as process:
        assert line(process) == "listening"
        process.send_signal(signal.SIGINT)
        assert line(process) == "stopping"


def test_a_worker_without_a_launcher_does_not_mind_an_end_of_input() -> None:
    with worker(control=False) as process:
        assert line(process) == "listening"
        assert process.stdin is not None
        process.stdin.close()
        time.sleep(0.3)
        assert process.poll() is None
        process.stdin = None


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")
def test_a_worker_and_what_it_forked_end_with_the_launcher_and_no_lock_keeps_the_fork() -> None:
    with worker(FORKER) as process:
        child = int(line(process))  # printed after the child has closed its standard input
        assert process.stdin is not None
        process.stdin.close()
        process.stdin = None
        process.wait(timeout=5.0)
        deadline = time.monotonic() + 5.0
        while running(child) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not running(child)
