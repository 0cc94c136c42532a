"""What the lab needs of the machine, whether it is there, and how to get it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NamedTuple

from shoal.cluster.description import Node
from shoal.errors import LabError
from shoal.launch.lab import quota, sweep
from shoal.launch.lab.claim import claim_new
from shoal.launch.lab.namespace import Network
from shoal.launch.lab.shaping import shape

_CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21}
_AS_ROOT = "run the same command with sudo; in a container, start that with --privileged"
_IPROUTE = "apt-get install iproute2"


class Requirement(NamedTuple):
    """One thing the lab needs.

    Attributes:
        what: its name, for a person.
        ok: whether it is there.
        remedy: how to get it; empty where it is there.
    """

    what: str
    ok: bool
    remedy: str


def require_rights() -> None:
    """Refuse at once, and say everything that is missing, where a lab cannot be made.

    Raises:
        LabError: no root, or iproute2 is not installed.
    """
    missing = [needed for needed in _rights_and_tools() if not needed.ok]
    if missing:
        wants = "; ".join(f"{needed.what} ({needed.remedy})" for needed in missing)
        raise LabError(f"the lab makes network namespaces and shapes links, for which it needs: {wants}")


def availability() -> list[Requirement]:
    """Check everything, by making and removing one small shaped network where the rights allow. Takes about 0.1 s."""
    needed = _rights_and_tools()
    if all(requirement.ok for requirement in needed):
        problem = _trial()
        needed.append(Requirement("network namespaces, bridge and tbf in the kernel", not problem, problem))
        needed.append(_controller())
    return needed


def _rights_and_tools() -> list[Requirement]:
    root = os.geteuid() == 0 and not _missing_capabilities()
    tools = [(f"the command '{tool}'", shutil.which(tool) is not None, _IPROUTE) for tool in ("ip", "tc")]
    everything = [("root with CAP_NET_ADMIN and CAP_SYS_ADMIN", root, _AS_ROOT), *tools]
    return [Requirement(what, ok, "" if ok else remedy) for what, ok, remedy in everything]


def _missing_capabilities() -> list[str]:
    status = Path("/proc/self/status").read_text()
    mask = next((int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:")), 0)
    return [name for name, bit in _CAPABILITIES.items() if not mask >> bit & 1]


def _trial() -> str:
    """What goes wrong with one shaped node; empty if nothing does."""
    claim = claim_new()
    node = Node(name="trial", link="100mbit")
    try:
        network = Network(claim.prefix, (node.name,))
        network.create()
        shape(network, (node,))
    except LabError as mistake:
        return str(mistake)
    finally:
        sweep.remove(claim)
    return ""


def _controller() -> Requirement:
    what = "the cpu controller of control groups (only for cpu=)"
    try:
        controller = quota.require_controller()
    except LabError as mistake:
        return Requirement(what, False, str(mistake))
    return Requirement(f"{what}, version {controller.version}", True, "")
