"""How many cores this process may really use, and how many threads that feeds.

A process may use no more than its affinity allows, nor than its control group (version 1 or 2) and every group around
it allow, whatever the machine has. Threads beyond that make every step wait for the scheduler.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

CONTROL_GROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def cores(root: Path = CONTROL_GROUPS, membership: Path = MEMBERSHIP) -> float:
    """Return how many cores' worth of time this process may use: the affinity or the quota, whichever is less."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = quota_cores(root, membership)
    return float(allowed) if quota is None else min(float(allowed), quota)


def threads(usable_cores: float, ranks_on_node: int) -> int:
    """Return how many threads each of the ranks that share `usable_cores` should compute with: at least 1.

    Part of a core feeds no thread: one that waits for the others' time slices holds up all of them.
    """
    return max(1, int(usable_cores / ranks_on_node))


def quota_cores(root: Path = CONTROL_GROUPS, membership: Path = MEMBERSHIP) -> float | None:
    """Return how many cores' worth of time the control group allows, or None for no limit.

    Args:
        root: where the control groups are mounted.
        membership: the file that says which groups the process is in.
    """
    limits = [_cores_v2(folder / "cpu.max") for folder in group_folders(root, membership, "")]
    limits += [_cores_v1(folder) for folder in group_folders(root, membership, "cpu")]
    return min((limit for limit in limits if limit is not None), default=None)


def group_folders(root: Path, membership: Path, controller: str) -> Iterator[Path]:
    """The group of `controller` ("" is version 2) that we are in, and those around it, up to the mount's root."""
    top = root / controller if controller else root
    # Inside a container the path may be the host's, of which only the root is mounted: those missing are passed over.
    path = top / _group(membership, controller).strip("/")
    yield path
    while path != top and top in path.parents:
        path = path.parent
        yield path


def read_whole_number(path: Path) -> int | None:
    """The whole number that is all of a file; None where there is no such file, or other text in it."""
    text = _text(path).strip()
    return int(text) if text.removeprefix("-").isdecimal() else None


def _group(membership: Path, controller: str) -> str:
    for line in _text(membership).splitlines():
        fields = line.split(":", 2)
        if len(fields) == 3 and controller in fields[1].split(","):
            return fields[2]
    return "/"


def _cores_v2(path: Path) -> float | None:
    words = _text(path).split()
    return int(words[0]) / int(words[1]) if len(words) == 2 and words[0].isdecimal() else None


def _cores_v1(folder: Path) -> float | None:
    quota_us = read_whole_number(folder / "cpu.cfs_quota_us")
    period_us = read_whole_number(folder / "cpu.cfs_period_us")
    return quota_us / period_us if quota_us and period_us and quota_us > 0 else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
