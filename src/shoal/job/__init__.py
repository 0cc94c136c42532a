"""The job: what is trained, as the user's own plain functions over plain PyTorch."""

from shoal.job.job import Job
from shoal.job.recipes import decay_groups, warmup
from shoal.job.sparse_table import SparseTable

__all__ = ["Job", "SparseTable", "decay_groups", "warmup"]
