"""What each rank alone holds (its own parameters, residuals of error feedback), written by itself.

A rank writes its files under a temporary name, tells rank 0 their sizes and digests through the store, and rank 0 takes
them into the checkpoint before that gets its name.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch.distributed import Store

from shoal.engine.checkpoint import tree
from shoal.engine.checkpoint.archive import Archive, Attachment
from shoal.errors import CheckpointError


class PrivateWriter:
    """One rank's writer of its own part."""

    def __init__(self, archive: Archive, store: Store, rank: int) -> None:
        self._archive = archive
        self._store = store
        self._rank = rank
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="shoal-private")
        self._pending: Future[None] | None = None

    def begin(self, serial: int, step: int, state: dict[str, Any]) -> None:
        """Start to write `state`, whose tensors nobody changes any more; `serial` counts the run's checkpoints."""
        self.wait()
        self._pending = self._executor.submit(self._write, serial, step, state)

    def wait(self) -> None:
        """Wait until what was begun last is written, or has failed and told so."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def abandon(self) -> None:
        """Let what was begun finish by itself."""
        self._executor.shutdown(wait=False)

    def close(self) -> None:
        """Finish what was begun and end the thread."""
        self.wait()
        self._executor.shutdown()

    def _write(self, serial: int, step: int, state: dict[str, Any]) -> None:
        try:
            encoded, tensors = tree.encode(state, "private")
            attachments = self._archive.write_private(f"{step}-{serial}", self._rank, encoded, tensors)
            told: dict[str, Any] = {"files": [attachment.to_plain() for attachment in attachments]}
        except (CheckpointError, OSError) as error:
            told = {"error": str(error)}
        self._store.set(_key(serial, self._rank), json.dumps(told))


def collect(store: Store, serial: int, world_size: int, wait: Callable[[list[str]], None]) -> list[Attachment]:
    """Rank 0: the files of all ranks; `wait` waits for keys of the store.

    Raises:
        CheckpointError: a rank could not write its own.
    """
    attachments: list[Attachment] = []
    for rank in range(world_size):
        key = _key(serial, rank)
        wait([key])
        told = json.loads(store.get(key))
        store.delete_key(key)
        if "error" in told:
            raise CheckpointError(f"rank {rank} could not write its part of the checkpoint: {told['error']}")
        attachments += [Attachment.from_plain(entry) for entry in told["files"]]
    return attachments


def _key(serial: int, rank: int) -> str:
    return f"private/{serial}/{rank}"
