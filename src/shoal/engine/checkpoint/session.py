"""Checkpoints of one training, seen from any rank: saving together, and going back to the newest one that is whole."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import Store

from shoal.engine import random_state
from shoal.engine.checkpoint import archive, tree
from shoal.engine.checkpoint.archive import Archive, Attachment, Saved
from shoal.engine.checkpoint.pieces import KEY, read_pieces
from shoal.engine.checkpoint.private import PrivateWriter, collect
from shoal.engine.checkpoint.writer import CheckpointWriter
from shoal.errors import CheckpointError
from shoal.events import EventLog

_PATIENCE = timedelta(seconds=600)


class CheckpointSession:
    """What one rank does for checkpoints: rank 0 writes; the others hand it their random states and own files."""

    def __init__(
        self, store: Store, rank: int, world_size: int, archive: Archive, log: EventLog, device: torch.device
    ) -> None:
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._archive = archive
        self._log = log
        self._device = device
        self._writer = CheckpointWriter(archive, log) if rank == 0 else None
        self._private = PrivateWriter(archive, store.clone(), rank)  # type: ignore[attr-defined]  # a client waits with its lock held
        self._chosen: Path | None = None
        self._serial = 0
        self.saved_step: int | None = None

    @property
    def failed(self) -> str | None:
        """Why the last checkpoint could not be written; None if it could, and on other ranks."""
        return self._writer.failed if self._writer else None

    def save(
        self,
        step: int,
        state: dict[str, Any],
        private: dict[str, Any],
        volatile: Iterable[Tensor],
        *,
        best: bool,
    ) -> None:
        """Begin a checkpoint; `before_update` must be called before the state changes. Called on every rank.

        Args:
            private: what this rank alone holds, in tensors that nobody changes; empty on all ranks or on none.
        """
        self.saved_step = step
        self._serial += 1
        if self._writer is not None:
            self._writer.wait()
        if private:
            self._private.begin(self._serial, step, private)
        self._store.set(f"random/{self._serial}/{self._rank}", json.dumps(random_state.capture(self._device)))
        if self._writer is not None:
            late = functools.partial(self._late, self._serial, attached=bool(private))
            self._writer.begin(step, state, best=best, volatile=list(volatile), late=late)

    def before_update(self) -> None:
        """Wait until a checkpoint that was begun has its copy of the state."""
        if self._writer is not None:
            self._writer.before_update()

    def wait(self) -> None:
        """Wait until the checkpoint that was begun last is on disk, or has failed."""
        self._private.wait()
        if self._writer is not None:
            self._writer.wait()

    def close(self) -> None:
        """Finish what was begun."""
        self._private.close()
        if self._writer is not None:
            self._writer.close()

    def restore(self, layout: Mapping[str, int]) -> dict[str, Any] | None:
        """Return the state of the newest whole checkpoint and set this rank's random generators; None if there is none.

        Damaged checkpoints are logged by name and passed over. Under another layout than `layout`'s the random
        generators stay as they are. Collective.

        Raises:
            CheckpointError: there are checkpoints, but not one is whole.
        """
        if self._rank == 0:
            self._archive.sweep()
            self._store.set("resume", self._choose())
        self._store.wait(["resume"], _PATIENCE)
        choice = json.loads(self._store.get("resume"))
        if choice["error"]:
            raise CheckpointError(choice["error"])
        if not choice["path"]:
            return None
        self._chosen = self._archive.path(choice["path"])
        document, tensors = archive.read(self._chosen)
        restored: dict[str, Any] = tree.decode(document["state"], tensors)
        if restored.get("layout") == layout:  # else the ranks' random states belong to others
            random_state.restore(document["late"][self._rank], self._device)
        divided = read_pieces(self._chosen)
        if divided is not None:
            restored["model"], restored["optimizer"] = divided
        self.saved_step = int(choice["step"])
        if self._rank == 0:
            self._log.write("resumed", step=choice["step"], checkpoint=choice["path"])
        return restored

    def restore_private(self) -> dict[str, Any] | None:
        """What this rank alone held in the checkpoint that `restore` chose; None if there is none."""
        part = archive.read_private(self._chosen, self._rank) if self._chosen else None
        if part is None:
            return None
        document, tensors = part
        own = {"items": [pair for pair in document["items"] if pair[0] != KEY]}
        state: dict[str, Any] = tree.decode(own, tensors)
        return state

    def last_good(self) -> str:
        """A phrase that names the newest checkpoint, for messages: rank 0's word, since it may still be writing."""
        if self._rank == 0:
            self.wait()
            whole = [saved for saved in self._archive.list() if saved.step >= 0]
            phrase = f"the last good checkpoint is {whole[-1].path}" if whole else "no checkpoint was written before"
            self._store.set("last_good", phrase)
        self._store.wait(["last_good"], _PATIENCE)
        return self._store.get("last_good").decode()

    def _choose(self) -> str:
        damaged: list[str] = []
        for saved in reversed(self._archive.list()):
            try:
                archive.read(saved.path)
                archive.verify(saved.path)
            except CheckpointError as error:
                damaged.append(str(error))
                self._log.write("checkpoint_damaged", checkpoint=saved.path.name, message=str(error))
                continue
            return _choice(saved, "")
        return _choice(None, f"no checkpoint is whole: {'; '.join(damaged)}" if damaged else "")

    def _late(self, serial: int, *, attached: bool) -> tuple[list[Any], list[Attachment]]:
        states = self._random_states(serial)
        return states, collect(self._store, serial, self._world_size, _PATIENCE) if attached else []

    def _random_states(self, serial: int) -> list[Any]:
        keys = [f"random/{serial}/{rank}" for rank in range(self._world_size)]
        self._store.wait(keys, _PATIENCE)
        states = [json.loads(self._store.get(key)) for key in keys]
        for key in keys:
            self._store.delete_key(key)
        return states


def _choice(saved: Saved | None, error: str) -> str:
    return json.dumps({"path": saved.path.name if saved else "", "step": saved.step if saved else 0, "error": error})
