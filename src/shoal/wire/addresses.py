"""Which of this machine's addresses other machines reach it at. IPv4, as the training network's libraries want it."""

from __future__ import annotations

import ipaddress
import socket
import sys
from collections.abc import Mapping

import psutil

from shoal.errors import UsageError

LOOPBACK = "127.0.0.1"
_INTERFACE = "GLOO_SOCKET_IFNAME"
_INTERFACES = (_INTERFACE, "NCCL_SOCKET_IFNAME")


def own_address(env: Mapping[str, str]) -> str:
    """The IPv4 address of this node on the training network: of GLOO_SOCKET_IFNAME's interface, else of the host."""
    for address in psutil.net_if_addrs().get(env.get(_INTERFACE, ""), ()):
        if address.family == socket.AF_INET:
            return str(address.address)
    return socket.gethostbyname(socket.gethostname())


def address_towards(address: str) -> str:
    """The address of this machine from which it reaches `HOST:PORT`, as its routes say; nothing is sent.

    Raises:
        UsageError: there is no way there.
    """
    host, port = address.rsplit(":", 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, int(port)))
        except OSError as error:
            raise UsageError(
                f"this machine has no route to {address} ({error.strerror}): is it on that network?"
            ) from None
        return str(probe.getsockname()[0])


def on_network_of(address: str) -> dict[str, str]:
    """The environment under which the training's libraries, and `own_address`, take the interface of `address`.

    Raises:
        UsageError: no interface of this machine has that address; the message lists those there are.
    """
    if address == LOOPBACK:
        return {_INTERFACE: "lo0" if sys.platform == "darwin" else "lo"}
    found = {
        str(one.address): interface
        for interface, addresses in psutil.net_if_addrs().items()
        for one in addresses
        if one.family == socket.AF_INET
    }
    if address not in found:
        there = ", ".join(f"{one} ({interface})" for one, interface in found.items())
        raise UsageError(
            f"--address got {address!r}, which is no IPv4 address of this machine; it has {there or 'none'}"
        )
    return dict.fromkeys(_INTERFACES, found[address])


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches an IPv4 address."""
    return ipaddress.ip_address(address).is_loopback
