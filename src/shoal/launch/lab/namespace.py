"""One network namespace for each node, and one for the switch that joins them.

The switch (a Linux bridge) has a namespace of its own, so nothing of a lab shows up in the machine's own network: no
interface, no address, no firewall rule of the host applies, and two labs can use the same addresses side by side.
All of it goes away with the namespaces.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from shoal.errors import LabError
from shoal.launch.lab.iproute import Batch, run_batches

T = TypeVar("T")

INTERFACE = "eth0"
"""The name of each node's interface, inside its namespace."""

NAMESPACES = Path("/run/netns")
HOSTS = Path("/etc/netns")

_NETWORK = ipaddress.ip_network("10.77.0.0/16")
_BRIDGE = "br0"
_DISABLED, _FORWARDING = 0, 3
"""States of a bridge's port: in the first it takes no frame in and lets none out."""

_CONGESTION_CONTROL = "cubic"
_AVAILABLE = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")
_CLONE_NEWNET = 0x40000000


class Network:
    """The names and addresses of one lab's namespaces, and the making of them."""

    def __init__(self, prefix: str, nodes: tuple[str, ...]) -> None:
        self.nodes = nodes
        self.switch = prefix
        self.switch_address = str(_NETWORK[-2])
        self._prefix = prefix

    def namespace(self, node: str) -> str:
        """The name of a node's namespace, as `ip netns exec` takes it."""
        return f"{self._prefix}-{node}"

    def address(self, node: str) -> str:
        """A node's IPv4 address."""
        return str(_NETWORK[self.nodes.index(node) + 1])

    def port(self, node: str) -> str:
        """The switch's end of a node's link."""
        return f"p{self.nodes.index(node)}"

    def create(self) -> None:
        """Make namespaces, links, addresses and host names; the links are not shaped yet.

        Raises:
            LabError: a step failed. What was made stays for the sweep, which finds it by name.
        """
        run_batches([Batch(tool="ip", lines=self._creation())])
        run_batches([self._switch_side(), *(self._node_side(node) for node in self.nodes)])
        for node in self.nodes:
            self._write_hosts(node)

    def _creation(self) -> list[str]:
        spaces = [self.switch, *(self.namespace(node) for node in self.nodes)]
        links = [
            f"link add name {INTERFACE} netns {self.namespace(node)}"
            f" type veth peer name {self.port(node)} netns {self.switch}"
            for node in self.nodes
        ]
        return [f"netns add {space}" for space in spaces] + links

    def _switch_side(self) -> Batch:
        lines = ["link set lo up", f"link add {_BRIDGE} type bridge mcast_snooping 0"]
        lines += _addressed(_BRIDGE, self.switch_address)
        for node in self.nodes:
            lines += [f"link set {self.port(node)} master {_BRIDGE}", *_up(self.port(node))]
        return Batch(tool="ip", lines=lines, namespace=self.switch)

    def _node_side(self, node: str) -> Batch:
        lines = ["link set lo up", *_addressed(INTERFACE, self.address(node))]
        return Batch(tool="ip", lines=lines, namespace=self.namespace(node))

    def _write_hosts(self, node: str) -> None:
        """Name all nodes, and let the machine's own name mean this node: `ip netns exec` puts it over /etc/hosts."""
        directory = HOSTS / self.namespace(node)
        lines = ["127.0.0.1 localhost", "::1 localhost"]
        own = socket.gethostname()
        lines += [f"{self.address(n)} {n}{f' {own}' if n == node and own != n else ''}" for n in self.nodes]
        # torch's store listens on IPv6 and looks up its clients so; without a name it warns once for each rank.
        lines += [f"::ffff:{self.address(n)} {n}.mapped" for n in self.nodes]
        try:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "hosts").write_text("\n".join(lines) + "\n")
        except OSError as mistake:
            raise LabError(f"cannot write {directory / 'hosts'}: {mistake.strerror}") from None

    def connect(self, node: str, connected: bool) -> None:
        """Let the switch pass a node's frames, or drop them without a word; both ends of the link stay up.

        Raises:
            LabError: `bridge` refused.
        """
        state = _FORWARDING if connected else _DISABLED
        # Not `ip link set ... type bridge_slave state`: that says nothing and does nothing.
        line = f"link set dev {self.port(node)} state {state}"
        run_batches([Batch(tool="bridge", lines=[line], namespace=self.switch)])

    def counters(self, node: str) -> tuple[int, int]:
        """A node's (sent, received) bytes since its interface was made."""
        text = inside(self.namespace(node), lambda: Path("/proc/thread-self/net/dev").read_text())
        line = next(line for line in text.splitlines() if line.strip().startswith(f"{INTERFACE}:"))
        fields = line.partition(":")[2].split()
        return int(fields[8]), int(fields[0])


def _addressed(interface: str, address: str) -> list[str]:
    lines = [f"address add {address}/{_NETWORK.prefixlen} dev {interface}", *_up(interface)]
    if _CONGESTION_CONTROL in _AVAILABLE.read_text().split():
        # Not the machine's own choice: with BBR, short transfers over these short queues are up to a fourth slower.
        route = f"{_NETWORK} dev {interface} src {address}"
        lines.append(f"route change {route} congctl {_CONGESTION_CONTROL}")
    return lines


def _up(interface: str) -> list[str]:
    # No IPv6 address: its discovery would be traffic that no rank asked for.
    return [f"link set {interface} addrgenmode none", f"link set {interface} up"]


def inside(namespace: str, action: Callable[[], T]) -> T:
    """Run `action` in a namespace, in a thread that enters it and then ends. A socket made there stays there.

    Raises:
        LabError: the namespace is not there or may not be entered.
    """
    results: list[T] = []
    mistakes: list[Exception] = []

    def enter_and_act() -> None:
        try:
            _enter(namespace)
            results.append(action())
        except Exception as mistake:
            mistakes.append(mistake)

    thread = threading.Thread(target=enter_and_act)
    thread.start()
    thread.join()
    if mistakes:
        raise mistakes[0]
    return results[0]


def _enter(namespace: str) -> None:
    try:
        descriptor = os.open(NAMESPACES / namespace, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as mistake:
        raise LabError(f"cannot open the namespace {namespace}: {mistake.strerror}") from None
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(descriptor, _CLONE_NEWNET) != 0:
            raise LabError(f"cannot enter the namespace {namespace}: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(descriptor)


def removal(names: list[str]) -> list[str]:
    """The `ip` lines that remove namespaces, with all links in them."""
    return [f"netns del {name}" for name in names]


def remove_hosts(name: str) -> None:
    """Remove the host names of one namespace, and the directory of all when it was the last."""
    shutil.rmtree(HOSTS / name, ignore_errors=True)
    try:
        HOSTS.rmdir()
    except OSError:
        return
