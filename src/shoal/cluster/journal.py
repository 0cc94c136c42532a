"""The coordinator's log on disk: one JSON document a line, durable before anybody is told, read back after a crash.

One coordinator at a time: the file is locked (flock) as long as it is open, and the system frees it with the process.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path

from shoal.cluster.views import Document
from shoal.errors import CoordinatorError
from shoal.run import sync_folder


class Journal:
    """An open log. `records` are those that were there when it was opened."""

    def __init__(self, path: Path) -> None:
        """Open or make `path`, and take it for this process.

        Raises:
            CoordinatorError: another coordinator has it, it cannot be written, or it is damaged before its last line.
        """
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            sync_folder(path.parent)
        except OSError as error:
            raise CoordinatorError(f"cannot open the coordinator's log {path}: {error.strerror}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._file)
            raise CoordinatorError(
                f"another coordinator is at work on {path}: end it first, or start a run of another name"
            ) from None
        self.path = path
        self.records = self._read()

    def append(self, records: Sequence[Document]) -> None:
        """Write all, and return when the disk has them.

        Raises:
            CoordinatorError: the disk refused; what was not acknowledged must not be acted on.
        """
        data = b"".join(json.dumps(record, separators=(",", ":")).encode() + b"\n" for record in records)
        try:
            while data:
                data = data[os.write(self._file, data) :]
            os.fdatasync(self._file)
        except OSError as error:
            raise CoordinatorError(f"cannot write the coordinator's log {self.path}: {error.strerror}") from None

    def close(self) -> None:
        """Close, and let another have it."""
        os.close(self._file)

    def _read(self) -> list[Document]:
        with open(self._file, "rb", closefd=False) as file:
            data = file.read()
        end = data.rfind(b"\n") + 1
        os.ftruncate(self._file, end)  # a torn last line was never acknowledged
        os.lseek(self._file, end, os.SEEK_SET)
        records = []
        for number, line in enumerate(data[:end].splitlines(), start=1):
            try:
                record = json.loads(line)
            except ValueError as error:
                raise CoordinatorError(f"{self.path}:{number}: the coordinator's log is damaged: {error}") from None
            records.append(record)
        return records
