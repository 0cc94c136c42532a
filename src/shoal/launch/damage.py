"""What a rehearsal does to a disk: fills it up, and flips a byte of a checkpoint."""

from __future__ import annotations

import errno
import os
import random
import shutil
from pathlib import Path

from shoal.errors import FaultsError
from shoal.units import format_bytes

MOST_FREE_BYTES = 1024**3
"""A disk with more room than this is not filled: it would take long, and is likely to be the machine's own."""

_PIECE_BYTES = 1024**2


def require_small_disk(folder: Path) -> None:
    """Refuse to fill a disk that is not a small one of the run's own.

    Raises:
        FaultsError: more than 1 GiB is free there.
    """
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes > MOST_FREE_BYTES:
        raise FaultsError(
            f"fill_disk: {format_bytes(free_bytes)} are free where the run directory {folder} is, and no more than "
            f"{format_bytes(MOST_FREE_BYTES)} are filled: put the run on a small file system of its own "
            "(mount -t tmpfs -o size=200m tmpfs DIR)"
        )


class Ballast:
    """All the room that is left on a disk, taken. It is a file without a name, so it cannot outlive this process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptor: int | None = None

    def fill(self) -> None:
        """Take the room that is left, to the last byte. Does nothing the second time.

        Raises:
            FaultsError: the disk is too large.
            OSError: it refused for another reason than being full.
        """
        if self._descriptor is not None:
            return
        require_small_disk(self._folder)
        path = self._folder / f".ballast-{os.getpid()}"
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        path.unlink()
        try:
            _write_until_full(self._descriptor)
        except OSError:
            self.remove()
            raise

    def remove(self) -> None:
        """Give the room back. Does nothing the second time."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _write_until_full(descriptor: int) -> None:
    piece = memoryview(bytes(_PIECE_BYTES))
    while piece:
        try:
            os.write(descriptor, piece)
        except OSError as mistake:
            if mistake.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            piece = piece[: len(piece) // 2]


def flip_byte(checkpoints: Path, seed: int) -> str | None:
    """Change one bit in one file of the newest checkpoint; the seed decides which.

    Returns:
        What was changed, for a person; None if there is no checkpoint yet.
    """
    folders = sorted(checkpoints.glob("step-*"), key=lambda path: (len(path.name), path.name))
    try:
        files = sorted(path for path in folders[-1].iterdir() if path.stat().st_size) if folders else []
    except FileNotFoundError:
        return None  # it was removed just now, and a newer one is there
    if not files:
        return None
    dice = random.Random(seed)
    path = dice.choice(files)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        position, bit = dice.randrange(os.fstat(descriptor).st_size), 1 << dice.randrange(8)
        (before,) = os.pread(descriptor, 1, position)
        os.pwrite(descriptor, bytes([before ^ bit]), position)
    finally:
        os.close(descriptor)
    return f"byte {position} of {path.parent.name}/{path.name}: {before:#04x} became {before ^ bit:#04x}"
