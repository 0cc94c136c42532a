"""How much CPU time a node gets: a control group with a quota, of version 1 or 2, whichever the machine has.

Groups are made at the root of the mounted hierarchy, one for each node and named as its namespace is, so that a sweep
finds those of a dead lab wherever the sweeping process itself has been put.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shoal.errors import LabError

_PERIOD_US = 20_000
"""Shorter than the kernel's 100 ms: half a core should look slow, not stop for 50 ms at a time."""

_LEAST_QUOTA_US = 1_000
_LONGEST_PERIOD_US = 1_000_000
_REMEDY = (
    "mount one (version 1: mount -t cgroup -o cpu cgroup /sys/fs/cgroup/cpu; version 2: add +cpu to "
    "/sys/fs/cgroup/cgroup.subtree_control; in a container: --privileged --cgroupns=host), "
    "or leave cpu= out of the cluster"
)


@dataclass(frozen=True, kw_only=True)
class CpuController:
    """Where the machine's CPU control groups are.

    Attributes:
        root: the mount point.
        version: 1 (`cpu.cfs_quota_us`) or 2 (`cpu.max`).
    """

    root: Path
    version: int

    def create(self, name: str, cpu: float) -> Path:
        """Make the group `name` with `cpu` cores' worth of time and return its directory.

        Raises:
            LabError: the quota is too small to set, or the kernel refused.
        """
        group = self.root / name
        try:
            group.mkdir(exist_ok=True)
        except OSError as mistake:
            raise LabError(f"cannot make the control group {group}: {mistake.strerror}; {_REMEDY}") from None
        self.change(group, cpu)
        return group

    def change(self, group: Path, cpu: float) -> None:
        """Give the processes of a group `cpu` cores' worth of time from now on.

        Raises:
            LabError: the quota is too small to set, or the kernel refused.
        """
        quota_us, period_us = _quota(cpu)
        try:
            if self.version == 2:
                (group / "cpu.max").write_text(f"{quota_us} {period_us}")
            else:
                (group / "cpu.cfs_period_us").write_text(str(period_us))
                (group / "cpu.cfs_quota_us").write_text(str(quota_us))
        except OSError as mistake:
            raise LabError(f"cannot set a quota of {cpu:g} CPU at {group}: {mistake.strerror}; {_REMEDY}") from None

    def groups(self) -> list[Path]:
        """All groups at the root, of labs and of others."""
        return [path for path in self.root.glob("shoal-*") if path.is_dir()]


def find_controller(mounts: str | None = None) -> CpuController | None:
    """Find the CPU controller among the mounts (the text of `/proc/self/mounts`); None if quotas cannot be had."""
    text = Path("/proc/self/mounts").read_text() if mounts is None else mounts
    entries = [line.split() for line in text.splitlines()]
    for _, place, kind, options, *_ in entries:
        if kind == "cgroup" and "cpu" in options.split(","):
            return CpuController(root=Path(place), version=1)
    for _, place, kind, *_ in entries:
        if kind == "cgroup2" and _delegates_cpu(Path(place)):
            return CpuController(root=Path(place), version=2)
    return None


def require_controller() -> CpuController:
    """As `find_controller`, but without one it raises LabError with the remedy."""
    controller = find_controller()
    if controller is None:
        raise LabError(f"cpu= needs the cpu controller of control groups, and none is mounted: {_REMEDY}")
    return controller


def _delegates_cpu(root: Path) -> bool:
    """Whether groups under `root` get `cpu.max`; it is switched on if the kernel lets us."""
    try:
        if "cpu" in (root / "cgroup.subtree_control").read_text().split():
            return True
        if "cpu" not in (root / "cgroup.controllers").read_text().split():
            return False
        (root / "cgroup.subtree_control").write_text("+cpu")
    except OSError:
        return False
    return True


def _quota(cpu: float) -> tuple[int, int]:
    """Quota and period in microseconds; the period grows where the kernel's least quota of 1 ms asks for it."""
    period_us = max(_PERIOD_US, math.ceil(_LEAST_QUOTA_US / cpu))
    if period_us > _LONGEST_PERIOD_US:
        raise LabError(f"cpu={cpu:g} is too little: the kernel's least quota is 0.001 of a core")
    return max(_LEAST_QUOTA_US, round(cpu * period_us)), period_us


def entry(group: Path) -> tuple[str, ...]:
    """The words to put before a command so that it runs in a group, under the process id it was started with."""
    return ("sh", "-c", 'echo $$ > "$1/cgroup.procs" && shift && exec "$@"', "sh", str(group))


def require_cores(cpus: Sequence[float]) -> None:
    """Refuse quotas that the machine's cores cannot all give at once.

    Raises:
        LabError: the sum is more than the cores this process may use.
    """
    cores = len(os.sched_getaffinity(0))
    if sum(cpus) > cores:
        raise LabError(
            f"the nodes ask for {sum(cpus):g} CPU together and this machine has {cores}: "
            f"{len(cpus)} nodes can have cpu={cores / len(cpus):.2g} each, or leave cpu= out"
        )


def members(group: Path) -> set[int]:
    """The ids of the processes in a group; none if it is gone."""
    try:
        # 0 stands for a process of another pid namespace; as an argument of kill() it would mean ourselves.
        return {int(pid) for pid in (group / "cgroup.procs").read_text().split()} - {0}
    except OSError:
        return set()


def remove(group: Path, *, timeout_s: float = 2.0) -> None:
    """Remove an emptied group. The kernel may hold it for a moment after its last process has gone."""
    deadline = time.monotonic() + timeout_s
    while group.exists() and time.monotonic() < deadline:
        try:
            group.rmdir()
        except OSError:
            time.sleep(0.005)
