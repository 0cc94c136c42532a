"""A machine finds the address at which others reach it, and says which it has where a wrong one is given."""

from __future__ import annotations

import socket

import psutil
import pytest

from shoal.errors import UsageError
from shoal.wire.addresses import LOOPBACK, address_towards, is_loopback, on_network_of, own_address


def test_loopback_is_reached_from_loopback() -> None:
    assert address_towards(f"{LOOPBACK}:80") == LOOPBACK
    assert own_address(on_network_of(LOOPBACK)) == LOOPBACK


def test_each_interface_is_found_by_its_address() -> None:
    for interface, addresses in psutil.net_if_addrs().items():
        for own in [one.address for one in addresses if one.family == socket.AF_INET][:1]:
            assert on_network_of(own)["GLOO_SOCKET_IFNAME"] == interface
            assert own_address(on_network_of(own)) == own
            assert address_towards(f"{own}:80") == own


@pytest.mark.parametrize("address", ["192.0.2.1", "0.0.0.0", "gpu1", ""])
def test_an_address_that_is_not_this_machines_is_answered_with_those_that_are(address: str) -> None:
    with pytest.raises(UsageError, match=rf"--address got '{address}', .* it has .*127\.0\.0\.1 \("):
        on_network_of(address)


def test_only_loopback_is_loopback() -> None:
    assert [is_loopback(one) for one in ("127.0.0.1", "127.0.1.1", "10.0.0.1", "0.0.0.0")] == [True, True, False, False]
