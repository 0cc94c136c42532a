"""Writes checkpoints while training goes on.

Parameters and optimizer state change only in the optimizer's step. So the copy is taken by a thread during the next
step's forward and backward, and the optimizer waits for it only if it is not done by then; hashing and writing the copy
take as long as they take. One checkpoint is written at a time: a new one waits for the last.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import Any

import torch
from torch import Tensor

from shoal.engine.checkpoint import tree
from shoal.engine.checkpoint.archive import Archive, Attachment
from shoal.errors import CheckpointError
from shoal.events import EventLog


class CheckpointWriter:
    """Rank 0's writer.

    Attributes:
        failed: the last failure's message, until a checkpoint succeeds.
        cost: of the last that succeeded: seconds that training stood still for it, and seconds of writing.
    """

    def __init__(self, archive: Archive, log: EventLog) -> None:
        self._archive = archive
        self._log = log
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="shoal-checkpoint")
        self._pending: Future[None] | None = None
        self._copied = Event()
        self._copied.set()
        self._stall_s = 0.0
        self.failed: str | None = None
        self.cost: tuple[float, float] | None = None

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint is on its way to the disk."""
        return self._pending is not None and not self._pending.done()

    def begin(
        self,
        step: int,
        state: dict[str, Any],
        *,
        best: bool,
        volatile: list[Tensor],
        late: Callable[[], tuple[Any, list[Attachment]]],
    ) -> None:
        """Start a checkpoint of live state; `before_update` must be called before any of it changes.

        Args:
            state: by part ("model", "optimizer", ...), each a state dict with tensors anywhere in it.
            volatile: tensors that change before the next update (a model's buffers): copied here and now.
            late: called by the thread, for what takes waiting: other ranks' random states, and files to attach.

        Raises:
            CheckpointError: the state has something that cannot be stored.
        """
        started = time.perf_counter()
        self.wait()
        encoded, tensors = tree.encode(state, "state")
        changing = {tensor.data_ptr() for tensor in volatile}
        copies = {name: _copy(t) for name, t in tensors.items() if t.data_ptr() in changing}
        rest = {name: t for name, t in tensors.items() if name not in copies}
        self._copied.clear()
        self._stall_s = time.perf_counter() - started
        self._pending = self._executor.submit(self._write, step, encoded, copies, rest, best, late)

    def before_update(self) -> None:
        """Wait until the state has been copied; from then on it may change."""
        if not self._copied.is_set():
            started = time.perf_counter()
            self._copied.wait()
            self._stall_s += time.perf_counter() - started

    def wait(self) -> None:
        """Wait until the checkpoint that was begun last is on disk, or has failed."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def close(self) -> None:
        """Finish what was begun and end the thread."""
        self.wait()
        self._executor.shutdown()

    def _write(
        self,
        step: int,
        encoded: Any,
        copies: dict[str, Tensor],
        rest: dict[str, Tensor],
        best: bool,
        late: Callable[[], tuple[Any, list[Attachment]]],
    ) -> None:
        try:
            try:
                fresh = {name: _copy(tensor) for name, tensor in rest.items()}
            finally:
                self._copied.set()
            _yield_to_training()
            _check_finite(step, fresh)
            copies |= fresh
            started = time.perf_counter()
            states, attachments = late()
            document = {"state": encoded, "late": states}
            path, size_bytes = self._archive.write(step, document, copies, best=best, attachments=attachments)
            write_s = time.perf_counter() - started
            self.failed, self.cost = None, (self._stall_s, write_s)
            self._log.write(
                "checkpoint_saved",
                step=step,
                path=f"{path.parent.name}/{path.name}",
                size_bytes=size_bytes,
                stall_s=self._stall_s,
                write_s=write_s,
            )
        except (CheckpointError, RuntimeError, OSError) as error:
            self.failed = str(error)
            self._log.write("checkpoint_failed", step=step, message=self.failed)
        finally:
            _yield_to_training(niceness=0)


def _yield_to_training(niceness: int = 5) -> None:
    """Let this thread's hashing and writing take the time that training leaves (Linux has priorities by thread)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # back to 0 needs a right; without it the copies, too, are made politely
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)


def _check_finite(step: int, tensors: dict[str, Tensor]) -> None:
    """A state that has diverged must not take the place of a good one: an overflow shows in the loss a step later."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"the state after step {step} is not saved: {name.removeprefix('state.')} is not finite; earlier "
                "checkpoints are untouched"
            )


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
