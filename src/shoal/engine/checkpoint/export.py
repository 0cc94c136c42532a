"""A checkpoint's model as one plain file for others to load: layout, optimizer and run left behind."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoal.engine.checkpoint import archive, tree
from shoal.engine.checkpoint.archive import Archive, Saved
from shoal.engine.checkpoint.pieces import read_pieces
from shoal.errors import CheckpointError, RunError


@dataclass(frozen=True)
class Exported:
    """What was written."""

    path: str
    checkpoint: str
    step: int
    num_tensors: int
    num_values: int
    size_bytes: int

    def to_plain(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def export_model(checkpoints: Path, target: Path, *, best: bool) -> Exported:
    """Write the newest (or best) checkpoint's model to `target`, whole or not at all.

    Raises:
        RunError: there is no checkpoint.
        CheckpointError: it is damaged, or the disk refused.
    """
    chosen = _choose(checkpoints, best=best)
    archive.verify(chosen.path)
    model = whole_model(chosen.path)
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".pt":
            torch.save(dict(model), temporary)
        else:
            archive.save_tensors(dict(model), temporary)
        os.replace(temporary, target)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise CheckpointError(f"could not write {target}: {error.strerror}; is there room and a right to?") from None
    count = sum(tensor.numel() for tensor in model.values())
    return Exported(str(target), chosen.path.name, chosen.step, len(model), count, target.stat().st_size)


def whole_model(checkpoint: Path) -> Mapping[str, Tensor]:
    """The model's state by name."""
    divided = read_pieces(checkpoint)
    if divided is not None:
        return dict(divided[0])
    document, tensors = archive.read(checkpoint)
    model: Mapping[str, Tensor] = tree.decode(document["state"], tensors)["model"]
    return model


def _choose(checkpoints: Path, *, best: bool) -> Saved:
    saved = [one for one in Archive(checkpoints, keep=1, keep_best=False).list() if one.step >= 0]
    if best:
        saved = [one for one in saved if one.best]
    if not saved:
        raise RunError(
            f"{checkpoints} has no {'best ' if best else ''}checkpoint to export; has the run saved one yet?"
        )
    return saved[-1]
