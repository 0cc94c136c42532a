"""`shoal train` and `shoal join` as a person starts them: processes of their own, watched through their event log."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from shoal.events import Event, read_events
from shoal.run import Run

PATIENCE_S = 90.0
_SHOAL = (sys.executable, "-m", "shoal.cli.main")


@dataclass(frozen=True)
class Ended:
    """How a command ended. `seconds`: how long it took."""

    code: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def json(self) -> dict[str, Any]:
        """The last line of stdout, parsed."""
        parsed: dict[str, Any] = json.loads(self.stdout.splitlines()[-1])
        return parsed


class Training:
    """One `shoal train` or `shoal join` that runs beside the test."""

    def __init__(self, process: subprocess.Popen[str], run: Run) -> None:
        self._process = process
        self._started = time.time()
        self.run = run

    def wait(self, patience_s: float = PATIENCE_S) -> Ended:
        """Wait for the end of the launcher."""
        stdout, stderr = self._process.communicate(timeout=patience_s)
        return Ended(self._process.returncode, stdout, stderr, time.time() - self._started)

    def interrupt(self) -> None:
        """Ctrl-C."""
        self._process.send_signal(signal.SIGINT)

    def wait_for(self, wanted: Callable[[Event], bool]) -> Event:
        """Wait until an event of this attempt is logged and return it."""
        deadline = time.time() + PATIENCE_S
        while time.time() < deadline:
            events = read_events(self.run.events) if self.run.events.exists() else []
            for event in events:
                if event["t"] >= self._started and wanted(event):
                    return event
            assert self._process.poll() is None, f"ended before: {self._process.communicate()}"
            time.sleep(0.01)
        raise AssertionError(f"no such event within {PATIENCE_S} s")

    def wait_for_step(self, step: int) -> None:
        """Wait until rank 0 has done `step` steps."""
        self.wait_for(lambda event: event["kind"] == "step" and event["step"] >= step and event["source"] == "rank-0")

    @property
    def launcher(self) -> psutil.Process:
        """The launcher."""
        return psutil.Process(self._process.pid)

    def workers(self) -> dict[int, psutil.Process]:
        """The workers that run now, by rank."""
        return {int(p.environ()["RANK"]): p for p in self.launcher.children() if "RANK" in p.environ()}

    def kill_launcher(self) -> list[psutil.Process]:
        """`kill -9` of the launcher alone; return what it leaves."""
        left = self.launcher.children(recursive=True)
        self._process.kill()
        self._process.communicate()
        return left

    def kill_everything(self) -> None:
        """`kill -9` of the launcher and all that it started, as a power cut would."""
        processes = [self.launcher, *self.launcher.children(recursive=True)]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()  # nobody may react to another's end
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.communicate()
        psutil.wait_procs(processes, timeout=10)


@contextlib.contextmanager
def training(
    job: str, run: Path, *options: str, env: dict[str, str] | None = None, prefix: Sequence[str] = ()
) -> Iterator[Training]:
    """Start `shoal train JOB --run RUN OPTIONS`, without end if no limit is given, and kill what is left of it."""
    bounded = {"--steps", "--epochs", "--seconds", "--until", "--resume"} & set(options)
    endless = [] if bounded else ["--epochs", "1000000"]
    with _started(run, [*prefix, *_SHOAL, "train", job, "--run", str(run), *options, *endless], env) as handle:
        yield handle


def train_until_joined(job: str, run: Path, *options: str, seat: int, then: int) -> int:
    """Train until the worker with `seat` has joined and done `then` steps more, then stop. Returns the last step.

    However long a process needs to start: on a busy machine that takes many times as long as on an idle one.
    """
    with training(job, run, *options) as handle:
        told = f"rank-{seat}"
        joined = handle.wait_for(lambda e: e["kind"] == "view" and e["source"] == told)
        enough = joined["step"] + then
        handle.wait_for(lambda e: e["kind"] == "step" and e["source"] == told and e["step"] >= enough)
        handle.interrupt()
        ended = handle.wait()
    assert ended.code == 0, ended.stderr
    return max(event["step"] for event in read_events(Run(run).events) if event["kind"] == "step")


@contextlib.contextmanager
def joining(run: Path, *options: str, prefix: Sequence[str] = ()) -> Iterator[Training]:
    """Start `shoal join RUN OPTIONS`, and kill what is left of it."""
    with _started(run, [*prefix, *_SHOAL, "join", str(run), *options]) as handle:
        yield handle


@contextlib.contextmanager
def _started(run: Path, command: Sequence[str], env: dict[str, str] | None = None) -> Iterator[Training]:
    process = subprocess.Popen(
        command,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    handle = Training(process, Run(run))
    try:
        yield handle
    finally:
        if process.poll() is None:
            handle.kill_everything()
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()


def train(job: str, run: Path, *options: str, env: dict[str, str] | None = None) -> Ended:
    """Run `shoal train` to its end."""
    with training(job, run, *options, env=env) as handle:
        return handle.wait()
