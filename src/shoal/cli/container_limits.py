"""What the container (control group, version 1 or 2) allows this process: cores and memory.

A process in a group may use no more than the group and every group around it allow, whatever the machine has. Where the
groups are, and what they allow of the CPU, is read in `cluster.cores`.
"""

from __future__ import annotations

from pathlib import Path

from shoal.cluster.cores import CONTROL_GROUPS, MEMBERSHIP, group_folders, quota_cores, read_whole_number

__all__ = ["memory_limit_bytes", "quota_cores"]

# Version 1 says "no limit" as the largest multiple of a page.
_NO_LIMIT_BYTES = 1 << 60


def memory_limit_bytes(root: Path = CONTROL_GROUPS, membership: Path = MEMBERSHIP) -> int | None:
    """Return how much memory the control group allows, in bytes, or None for no limit."""
    limits = [read_whole_number(folder / "memory.max") for folder in group_folders(root, membership, "")]
    limits += [
        read_whole_number(folder / "memory.limit_in_bytes") for folder in group_folders(root, membership, "memory")
    ]
    return min((limit for limit in limits if limit is not None and 0 < limit < _NO_LIMIT_BYTES), default=None)
