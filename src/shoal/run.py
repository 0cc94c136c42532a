"""The run directory: what one training left behind, and where each thing lies.

runs/charlm-20260102-030405/
    plan.toml        the resolved plan: everything that was decided, nothing left to defaults
    run.json         job, arguments, plan hash, versions
    events/          one JSON-lines file a process; see events.py
    logs/            what each worker printed
    checkpoints/     step-00000100/, ...; see engine/checkpoint
    coordinator/     of an elastic run, for its owner only: views-ID.jsonl, its log; invitation.json, what a worker
                     needs to join; seats-ID/, the seats that were given out
    report.html      made by `shoal report`
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.errors import RunError


@dataclass(frozen=True)
class Run:
    """The paths of one run directory. Making the object touches nothing on disk."""

    path: Path

    @property
    def plan(self) -> Path:
        """The resolved plan."""
        return self.path / "plan.toml"

    @property
    def events(self) -> Path:
        """The folder of event files."""
        return self.path / "events"

    @property
    def logs(self) -> Path:
        """The folder of what the workers printed."""
        return self.path / "logs"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        """The page for a person."""
        return self.path / "report.html"

    @property
    def curve(self) -> Path:
        """The loss curve as a picture."""
        return self.path / "loss.png"

    @property
    def coordinator(self) -> Path:
        """The folder of an elastic run's coordinator: its log, and what lets members in. Only its owner may look."""
        return self.path / "coordinator"

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Hold the run for one launcher. The kernel lets go of it when that ends, however it ends.

        Raises:
            RunError: another launcher holds it.
        """
        with (self.path / ".lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise RunError(
                    f"{self.path} is being trained by another `shoal train` (process {holder}); wait for its end, stop "
                    "it, or name another --run"
                ) from None
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            yield

    def write_info(self, info: dict[str, Any]) -> None:
        """Store what identifies the run (job, arguments, plan hash)."""
        write_atomic(self.path / "run.json", json.dumps(info, indent=2).encode() + b"\n")

    def read_info(self) -> dict[str, Any]:
        """Return what `write_info` stored.

        Raises:
            RunError: `path` is not a run directory, or its run.json is damaged.
        """
        try:
            info = json.loads((self.path / "run.json").read_text())
        except FileNotFoundError:
            raise RunError(
                f"{self.path} is not a run directory: it has no run.json; expected the folder that `shoal train` "
                "named in its last line"
            ) from None
        except ValueError as error:
            raise RunError(f"{self.path / 'run.json'} is damaged ({error}); is this the right folder?") from None
        if not isinstance(info, dict):
            raise RunError(f"{self.path / 'run.json'} holds {type(info).__name__}, expected an object")
        return info


def open_run(path: Path | None, job_name: str, *, resume: bool) -> Run:
    """Make a new run directory, or open an existing one to resume it.

    Args:
        path: where; None makes `runs/JOB-DATE-TIME` under the working directory.
        job_name: the job's function or file name, for the default path.
        resume: True asks for an existing run, False for a new one.

    Raises:
        RunError: the run exists and `resume` is False, or the other way round, or nothing can be written there.
    """
    if path is None:
        if resume:
            raise RunError("--resume needs to know which run: add --run DIR")
        path = _fresh_path(job_name)
    run = Run(path.absolute())
    exists = (run.path / "run.json").exists()
    if exists and not resume:
        raise RunError(f"{path} holds a run already: add --resume to continue it, or name another --run")
    if not exists and resume:
        raise RunError(f"{path} holds no run to resume: it has no run.json")
    if not exists and run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
        raise RunError(f"{path} exists and is not an empty directory: name another --run")
    _make_writable(run)
    return run


def write_atomic(path: Path, data: bytes, *, mode: int = 0o666) -> None:
    """Replace `path` by `data` so that a crash leaves either the old file or the new one, whole.

    `mode`: who may read and write it, less what the process's umask takes away.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)  # of a process that died: it might have another mode
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make renames inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fresh_path(job_name: str) -> Path:
    stem = f"{job_name}-{time.strftime('%Y%m%d-%H%M%S')}"
    path = Path("runs") / stem
    serial = 2
    while path.exists():
        path = Path("runs") / f"{stem}-{serial}"
        serial += 1
    return path


def _make_writable(run: Run) -> None:
    try:
        for folder in (run.path, run.events, run.logs, run.checkpoints):
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
    except OSError as error:
        raise RunError(
            f"cannot write to the run directory {run.path}: {error.strerror or error}; name a writable one with --run"
        ) from None
