"""Removing all that a lab made: its processes, namespaces, control groups, host names and lock.

Everything is found by the lab's id in its name, never by a list somebody had to keep, so the same few lines serve a
lab that ends, one that failed half way, and one whose parent was killed.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from shoal.launch.lab import namespace, quota
from shoal.launch.lab.claim import Claim, claim_dead, claimed_ids, is_dead, lab_id_in
from shoal.launch.lab.iproute import run_all_lines

_KILL_TIMEOUT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Remains:
    """What of one lab is on the machine, found by name."""

    namespaces: tuple[str, ...]
    hosts: tuple[str, ...]
    groups: tuple[Path, ...]

    def processes(self) -> set[int]:
        """Processes in the lab's namespaces or control groups, except this one."""
        found = {pid for group in self.groups for pid in quota.members(group)}
        spaces = {_identity(namespace.NAMESPACES / name) for name in self.namespaces} - {None}
        found |= {pid for pid in _all_processes() if _identity(Path(f"/proc/{pid}/ns/net")) in spaces}
        return found - {os.getpid()}


def remains_of(lab_id: str) -> Remains:
    """Find what bears this id."""
    controller = quota.find_controller()
    groups = controller.groups() if controller else []
    return Remains(
        namespaces=tuple(name for name in _names(namespace.NAMESPACES) if lab_id_in(name) == lab_id),
        hosts=tuple(name for name in _names(namespace.HOSTS) if lab_id_in(name) == lab_id),
        groups=tuple(group for group in groups if lab_id_in(group.name) == lab_id),
    )


def remove(claim: Claim) -> None:
    """Remove everything of a claimed lab, then the claim. Killed processes get no chance to clean up (SIGKILL)."""
    remains = remains_of(claim.lab_id)
    _kill(remains)
    run_all_lines(namespace.removal(list(remains.namespaces)))
    for name in remains.hosts:
        namespace.remove_hosts(name)
    for group in remains.groups:
        quota.remove(group)
    claim.release()


def sweep() -> int:
    """Remove all labs whose owner is gone and return how many there were. Labs that live are left alone."""
    swept = 0
    for lab_id in _all_ids():
        claim = claim_dead(lab_id)
        if claim is not None:
            remove(claim)
            swept += 1
    return swept


def leftovers() -> int:
    """Count the labs whose owner is gone and that a sweep would remove; nothing is removed."""
    return sum(is_dead(lab_id) for lab_id in _all_ids())


def _all_ids() -> list[str]:
    controller = quota.find_controller()
    names = [*_names(namespace.NAMESPACES), *_names(namespace.HOSTS)]
    names += [group.name for group in controller.groups()] if controller else []
    return sorted(claimed_ids() | {lab_id for name in names if (lab_id := lab_id_in(name))})


def _kill(remains: Remains) -> None:
    deadline = time.monotonic() + _KILL_TIMEOUT_S
    while (processes := remains.processes()) and time.monotonic() < deadline:
        for pid in processes:
            _kill_one(pid)
        time.sleep(0.01)


def _kill_one(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def _names(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


def _all_processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _identity(path: Path) -> tuple[int, int] | None:
    """The device and inode of a file (equal for two names of one namespace); None if it is gone."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
