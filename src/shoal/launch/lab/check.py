"""What the shaping really gives: a short TCP transfer over each link, each way, and a busy loop under each quota.

Every link is measured between its node and the switch, so a slow neighbour does not show in it. All nodes are
measured at once; what comes out wrong is measured again alone, and only then refused, because a busy machine is not
a bad lab.
TCP's own headers are about 4 % of a full frame, so 0.956 of the rate is the most a transfer can show.
"""

from __future__ import annotations

import contextlib
import functools
import math
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from shoal.cluster.description import Node
from shoal.errors import LabError
from shoal.launch.lab import busy, quota
from shoal.launch.lab.namespace import Network, inside
from shoal.launch.lab.shaping import FRAME_BYTES
from shoal.units import format_rate

LEAST, MOST = 0.85, 1.10
"""The measured part of what was asked that is accepted."""

_WARM_UP_S = 0.05
_WINDOW_S = 0.2
_WINDOW_FRAMES = 60
_SPIN_S = 0.4
_ATTEMPTS_ALONE = 3
_TIMEOUT_S = 30.0
_CHUNK = 256 * 1024
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one node really gets; None where nothing was asked, so nothing was measured.

    Attributes:
        up_bits_per_s: payload it can send.
        down_bits_per_s: payload it can receive.
        cpu: cores' worth of CPU time.
    """

    up_bits_per_s: float | None = None
    down_bits_per_s: float | None = None
    cpu: float | None = None


@dataclass(frozen=True, kw_only=True)
class _Probe:
    """One quantity to measure: of which node, how much was asked, and how to find out."""

    node: str
    what: str
    asked: float
    measure: Callable[[], float]
    show: Callable[[float], str]


@dataclass(frozen=True, kw_only=True)
class _End:
    """Where a transfer starts or ends."""

    namespace: str
    address: str


def check(network: Network, nodes: Sequence[Node], groups: Mapping[str, Path]) -> dict[str, Measured]:
    """Measure every shaped link and every quota.

    Args:
        groups: the control group of each node that has a quota.

    Returns:
        What each node gets, by name.

    Raises:
        LabError: a quantity is outside 0.85 to 1.10 of what was asked, also when measured alone.
    """
    links = [probe for node in nodes for probe in _link_probes(network, node)]
    quotas = [_quota_probe(node, groups[node.name]) for node in nodes if node.cpu is not None]
    found: dict[tuple[str, str], float] = {}
    # One after the other: acknowledgements take rate from the other direction, and moving bytes takes CPU time.
    for phase in (_of(links, "up"), _of(links, "down"), quotas):
        found |= _measure(phase)
    return {
        node.name: Measured(
            up_bits_per_s=found.get((node.name, "up")),
            down_bits_per_s=found.get((node.name, "down")),
            cpu=found.get((node.name, "cpu")),
        )
        for node in nodes
    }


def _of(probes: Sequence[_Probe], what: str) -> list[_Probe]:
    return [probe for probe in probes if probe.what == what]


def _measure(probes: Sequence[_Probe]) -> dict[tuple[str, str], float]:
    if not probes:
        return {}
    with ThreadPoolExecutor(max_workers=len(probes)) as pool:
        first = list(pool.map(lambda probe: probe.measure(), probes))
    return {(p.node, p.what): _settled(p, value) for p, value in zip(probes, first, strict=True)}


def _settled(probe: _Probe, value: float) -> float:
    attempts = 0
    while not LEAST <= value / probe.asked <= MOST:
        if attempts == _ATTEMPTS_ALONE:
            raise LabError(_refusal(probe, value))
        value = probe.measure()
        attempts += 1
    return value


def _refusal(probe: _Probe, value: float) -> str:
    part = value / probe.asked
    remedy = (
        "this machine is too slow or too busy for it: ask for less, or stop what else runs"
        if part < 1
        else "the limit does not hold on this kernel"
    )
    return (
        f"{probe.node}, {probe.what}: got {probe.show(value)}, expected {probe.show(probe.asked)} "
        f"({part:.2f} of it; {LEAST:.2f} to {MOST:.2f} is accepted); {remedy}"
    )


def _link_probes(network: Network, node: Node) -> list[_Probe]:
    rate = node.rate_bits_per_s
    if rate is None:
        return []
    own = _End(namespace=network.namespace(node.name), address=network.address(node.name))
    switch = _End(namespace=network.switch, address=network.switch_address)
    measure = functools.partial(_rate, window_s=_window_s(rate))
    up, down = functools.partial(measure, own, switch), functools.partial(measure, switch, own)
    return [
        _Probe(node=node.name, what=what, asked=rate, measure=way, show=format_rate)
        for what, way in (("up", up), ("down", down))
    ]


def _window_s(rate_bits_per_s: float) -> float:
    return max(_WINDOW_S, _WINDOW_FRAMES * FRAME_BYTES * 8 / rate_bits_per_s)


def _rate(source: _End, sink: _End, *, window_s: float) -> float:
    """Send from one end to the other for about `window_s` and return the payload's rate in bits per second."""
    with _connection(source, sink) as (sender, receiver):
        pump = threading.Thread(target=_pump, args=(sender,))
        pump.start()
        try:
            return _received_bits_per_s(receiver, window_s)
        finally:
            sender.shutdown(socket.SHUT_RDWR)
            pump.join()


@contextlib.contextmanager
def _connection(source: _End, sink: _End) -> Iterator[tuple[socket.socket, socket.socket]]:
    with inside(sink.namespace, socket.socket) as listener, inside(source.namespace, socket.socket) as sender:
        for end in (listener, sender):
            end.settimeout(_TIMEOUT_S)
        listener.bind((sink.address, 0))
        listener.listen(1)
        sender.connect(listener.getsockname())
        receiver, _ = listener.accept()
        with receiver:
            receiver.settimeout(_TIMEOUT_S)
            # Reset instead of a farewell: what is still queued need not cross a slow link.
            for end in (receiver, sender):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            yield sender, receiver


def _pump(sender: socket.socket) -> None:
    data = bytes(_CHUNK)
    try:
        while True:
            sender.send(data)
    except OSError:
        return


def _received_bits_per_s(receiver: socket.socket, window_s: float) -> float:
    """From arrival to arrival, after the bucket's first burst and TCP's slow start have passed."""
    buffer = bytearray(_CHUNK)
    warm = time.perf_counter() + _WARM_UP_S
    while time.perf_counter() < warm:
        receiver.recv_into(buffer)
    begin = now = time.perf_counter()
    received = 0
    while now - begin < window_s:
        received += receiver.recv_into(buffer)
        now = time.perf_counter()
    return received * 8 / (now - begin)


def _quota_probe(node: Node, group: Path) -> _Probe:
    assert node.cpu is not None
    return _Probe(
        node=node.name,
        what="cpu",
        asked=node.cpu,
        measure=lambda: _cores_used(group, math.ceil(node.cpu or 1)),
        show=lambda cores: f"{cores:.3g} of a core",
    )


def _cores_used(group: Path, num_processes: int) -> float:
    program = (sys.executable, "-I", "-S", busy.__file__, str(_SPIN_S), str(num_processes))
    done = subprocess.run([*quota.entry(group), *program], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LabError(f"no process could run in the control group {group}: {done.stderr.strip()}")
    return float(done.stdout)
