"""Whose a lab is: an id in the name of everything it makes, and a locked file that says its owner lives.

The kernel drops an `flock` when its holder dies, however it dies. So a lab whose lock can be taken is dead, and what
bears its id may be swept; no process id is compared and no clock is asked.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import tempfile
from pathlib import Path

from shoal.errors import LabError

_ID = re.compile(r"shoal-([0-9a-f]{8})(?:-.*)?")


def lock_directory() -> Path:
    """Where lock files are: `/run/shoal-lab`, or under the temporary directory where `/run` is not writable."""
    run = Path("/run")
    return (run if os.access(run, os.W_OK) else Path(tempfile.gettempdir())) / "shoal-lab"


def lab_id_in(name: str) -> str | None:
    """The lab id in the name of a namespace or control group; None for a name that no lab gave."""
    match = _ID.fullmatch(name)
    return match[1] if match else None


class Claim:
    """A held lock on one lab id. Release it only when nothing with this id is left."""

    def __init__(self, lab_id: str, path: Path, descriptor: int) -> None:
        self.lab_id = lab_id
        self._path = path
        self._descriptor: int | None = descriptor

    @property
    def prefix(self) -> str:
        """What every name of this lab begins with."""
        return f"shoal-{self.lab_id}"

    def release(self) -> None:
        """Remove the lock file, then let go of the lock. Does nothing the second time."""
        if self._descriptor is None:
            return
        self._path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = None
        _remove_if_empty(self._path.parent)


def claim_new() -> Claim:
    """Claim an id that no other lab has."""
    for _ in range(100):
        claim = claim_dead(secrets.token_hex(4))
        if claim is not None:
            return claim
    raise LabError(f"no lock could be taken in {lock_directory()} in 100 attempts")


def claim_dead(lab_id: str) -> Claim | None:
    """Take over the id of a lab whose owner is gone; None while its owner (or another sweeper) lives."""
    directory = lock_directory()
    path = directory / f"{lab_id}.lock"
    try:
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except FileNotFoundError:  # another lab removed the empty directory in between
        return None
    except OSError as mistake:
        raise LabError(f"cannot make the lock file {path}: {mistake.strerror}") from None
    if _lock(descriptor) and _is_still_at(descriptor, path):
        return Claim(lab_id, path, descriptor)
    os.close(descriptor)
    return None


def is_dead(lab_id: str) -> bool:
    """Whether the owner of an id is gone. Takes nothing over and makes no file."""
    try:
        descriptor = os.open(lock_directory() / f"{lab_id}.lock", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        return _lock(descriptor)
    finally:
        os.close(descriptor)


def claimed_ids() -> set[str]:
    """The ids that have a lock file, alive or dead."""
    return {path.stem for path in lock_directory().glob("*.lock") if lab_id_in(f"shoal-{path.stem}")}


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_still_at(descriptor: int, path: Path) -> bool:
    """Whether the locked file is the one at `path`: its last holder may have removed it before we locked."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _remove_if_empty(directory: Path) -> None:
    try:
        directory.rmdir()
    except OSError:
        return
