"""Shoal trains one PyTorch model on the machines you have.

import shoal

def job() -> shoal.Job: ...

shoal.train(job, nodes=4)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from shoal._version import __version__

if TYPE_CHECKING:
    from shoal.errors import MissingExtra, ShoalError
    from shoal.job import Job, SparseTable, decay_groups, warmup
    from shoal.plan import Plan, load_plan
    from shoal.training import Result, train

_HOME = {
    "Job": "shoal.job",
    "MissingExtra": "shoal.errors",
    "Plan": "shoal.plan",
    "Result": "shoal.training",
    "ShoalError": "shoal.errors",
    "SparseTable": "shoal.job",
    "decay_groups": "shoal.job",
    "load_plan": "shoal.plan",
    "train": "shoal.training",
    "warmup": "shoal.job",
}

__all__ = [
    "Job",
    "MissingExtra",
    "Plan",
    "Result",
    "ShoalError",
    "SparseTable",
    "__version__",
    "decay_groups",
    "load_plan",
    "train",
    "warmup",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `import shoal` alone stays quick."""
    if name not in _HOME:
        raise AttributeError(f"module 'shoal' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
