"""Checkpoints of one training, seen from any rank: saving together, and going back to the newest one that is whole."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

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
_SLICE = timedelta(seconds=1)


class Ranks(Protocol):
    """What a session needs to know of a view; `wire.groups.World` has it.

    Attributes:
        store: shared by all ranks of the view.
    """

    store: Store
    rank: int
    size: int


class CheckpointSession:
    """What one rank does for checkpoints: rank 0 writes; the others hand it their random states and own files.

    It outlives a view: what was begun in one is finished in the next, if all ranks had told what belongs to it.
    """

    def __init__(self, ranks: Ranks, archive: Archive, log: EventLog, device: torch.device) -> None:
        self._archive = archive
        self._log = log
        self._device = device
        self._own_writer: CheckpointWriter | None = None
        self._chosen: Path | None = None
        self.saved_step: int | None = None
        self.enter(ranks)

    def enter(self, ranks: Ranks) -> None:
        """Go on in another view."""
        self._store, self._rank, self._world_size = ranks.store, ranks.rank, ranks.size
        self._serial = 0
        self._private = PrivateWriter(self._archive, self._store.clone(), self._rank)  # type: ignore[attr-defined]  # a client waits with its lock held
        if self._rank == 0 and self._own_writer is None:
            self._own_writer = CheckpointWriter(self._archive, self._log)
        self._writer = self._own_writer if self._rank == 0 else None
        self.saved_step = None

    def leave(self) -> None:
        """A view has ended; what it has begun is finished in the background."""
        self.before_update()
        self._private.abandon()

    @property
    def failed(self) -> str | None:
        """Why the last checkpoint could not be written; None if it could, and on other ranks."""
        return self._writer.failed if self._writer else None

    @property
    def is_writing(self) -> bool:
        """Whether this rank is writing a checkpoint."""
        return self._writer is not None and self._writer.is_writing

    def take_cost(self) -> tuple[float, float] | None:
        """(seconds that training stood still, seconds of writing) of a checkpoint written since the last call."""
        if self._writer is None:
            return None
        cost, self._writer.cost = self._writer.cost, None
        return cost

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
            late = functools.partial(self._late, self._store, self._world_size, self._serial, attached=bool(private))
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

    def drain(self) -> None:
        """Wait until this process writes nothing any more, in whatever view it was begun."""
        self._private.wait()
        if self._own_writer is not None:
            self._own_writer.wait()

    def close(self) -> None:
        """Finish what was begun."""
        self._private.close()
        if self._own_writer is not None:
            self._own_writer.close()

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

    def restore_private(self, rank: int | None = None) -> dict[str, Any] | None:
        """What this rank alone, or rank `rank`, held in the checkpoint that `restore` chose; None if there is none."""
        part = archive.read_private(self._chosen, self._rank if rank is None else rank) if self._chosen else None
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

    def _late(
        self, store: Store, world_size: int, serial: int, *, attached: bool
    ) -> tuple[list[Any], list[Attachment]]:
        wait = functools.partial(self._wait, store)
        keys = [f"random/{serial}/{rank}" for rank in range(world_size)]
        wait(keys)
        states = [json.loads(store.get(key)) for key in keys]
        for key in keys:
            store.delete_key(key)
        return states, collect(store, serial, world_size, wait) if attached else []

    def _wait(self, store: Store, keys: list[str]) -> None:
        """Wait for keys of a view, not much longer than the view lasts.

        Raises:
            CheckpointError: the view ended before they were there, or they did not come.
        """
        deadline = time.monotonic() + _PATIENCE.total_seconds()
        while True:
            ended = store is not self._store
            try:
                store.wait(keys, _SLICE)
                return
            except RuntimeError:
                if ended or time.monotonic() > deadline:
                    reason = "its view ended before" if ended else f"within {_PATIENCE} not"
                    raise CheckpointError(
                        f"a checkpoint was given up: {reason} all ranks had told their part"
                    ) from None


def _choice(saved: Saved | None, error: str) -> str:
    return json.dumps({"path": saved.path.name if saved else "", "step": saved.step if saved else 0, "error": error})
