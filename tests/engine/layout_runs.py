"""Layouts held against a single process: the reference and what a run ended with, by whole parameters."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from shoal.engine.checkpoint import archive, tree
from shoal.engine.checkpoint.pieces import KEY, read_pieces
from shoal.run import Run
from shoal.strategy.layout.region import Region
from training_runs import final_state, newest_checkpoint


def final_model(run: Run) -> dict[str, Tensor]:
    """The whole model at a run's end, whatever its layout."""
    return model_in(newest_checkpoint(run)) or final_state(run)["model"]


def model_in(checkpoint: Path) -> dict[str, Tensor]:
    """The whole model in a checkpoint in pieces; empty if it is not in pieces."""
    found = read_pieces(checkpoint)
    return dict(found[0]) if found else {}


def pieces_in(checkpoint: Path, rank: int) -> dict[str, Region]:
    """Which part of each parameter one rank wrote."""
    document, tensors = archive.read_private(checkpoint, rank) or ({}, {})
    pieces = tree.decode(document, tensors)[KEY]["parameters"]
    return {name: Region.from_plain(piece["region"]) for name, piece in pieces.items()}


def relative_difference(value: Tensor, reference: Tensor) -> float:
    """The largest difference, over the reference's largest value."""
    if reference.numel() == 0:
        return 0.0
    return float((value - reference).abs().max() / reference.abs().max().clamp(min=1e-30))
