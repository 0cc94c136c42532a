"""What the container (control group, version 1 or 2) allows this process: cores and memory.

A process in a group may use no more than the group and every group around it allow, whatever the machine has.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_SELF = Path("/proc/self/cgroup")
# Version 1 says "no limit" as the largest multiple of a page.
_NO_LIMIT_BYTES = 1 << 60


def quota_cores(root: Path = _ROOT, membership: Path = _SELF) -> float | None:
    """Return how many cores' worth of time the control group allows, or None for no limit.

    Args:
        root: where the control groups are mounted.
        membership: the file that says which groups the process is in.
    """
    limits = [_cores_v2(folder / "cpu.max") for folder in _folders(root, membership, "")]
    limits += [_cores_v1(folder) for folder in _folders(root, membership, "cpu")]
    return min((limit for limit in limits if limit is not None), default=None)


def memory_limit_bytes(root: Path = _ROOT, membership: Path = _SELF) -> int | None:
    """Return how much memory the control group allows, in bytes, or None for no limit."""
    limits = [_integer(folder / "memory.max") for folder in _folders(root, membership, "")]
    limits += [_integer(folder / "memory.limit_in_bytes") for folder in _folders(root, membership, "memory")]
    return min((limit for limit in limits if limit is not None and 0 < limit < _NO_LIMIT_BYTES), default=None)


def _folders(root: Path, membership: Path, controller: str) -> Iterator[Path]:
    """The group of `controller` ("" is version 2) that we are in, and those around it, up to the mount's root."""
    top = root / controller if controller else root
    # Inside a container the path may be the host's, of which only the root is mounted: those missing are passed over.
    path = top / _group(membership, controller).strip("/")
    yield path
    while path != top and top in path.parents:
        path = path.parent
        yield path


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
    quota_us, period_us = _integer(folder / "cpu.cfs_quota_us"), _integer(folder / "cpu.cfs_period_us")
    return quota_us / period_us if quota_us and period_us and quota_us > 0 else None


def _integer(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.lstrip("-").isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
