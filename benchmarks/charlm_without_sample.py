"""The job of examples/charlm.py without the text that it writes at the end, which takes longer than a short run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import shoal
from shoal.job.target import resolve

EXAMPLE = Path(__file__).parents[1] / "examples" / "charlm.py"


def job(layers: int = 4, dim: int = 256) -> shoal.Job:
    """The same model, data, loss and optimizer."""
    return dataclasses.replace(resolve(f"{EXAMPLE}:job", [f"layers={layers}", f"dim={dim}"]).load(), sample=None)
