"""The rate of a link: a token bucket at either end, so that each direction is limited where it leaves.

A node's own end limits what it sends; the switch's end limits what it receives. Both are `tc tbf`.
"""

from __future__ import annotations

import math

from shoal.cluster.description import Node
from shoal.launch.lab.iproute import Batch, run_batches
from shoal.launch.lab.namespace import INTERFACE, Network

FRAME_BYTES = 1514

_BURST_S = 1e-3
"""How long the bucket may send at full speed after a pause: longer flatters short messages, shorter loses rate."""

_BURST_FRAMES = 10
"""The least burst: below about ten frames, late timers cost slow links rate."""

_LARGEST_SEGMENT_BYTES = 64 * 1024
"""What TCP hands to an interface at once, where nothing limits it."""

_QUEUE_S = 0.05
_QUEUE_BYTES = 64 * 1024
"""The longest queue, in time and at least in bytes, as in a small switch; what does not fit is dropped. Longer ones
delay the acknowledgements of the other direction: with 256 KiB an all-reduce at 10 Mbit/s lost a tenth of its rate."""


def shape(network: Network, nodes: tuple[Node, ...]) -> None:
    """Limit both directions of every node's link that has a rate.

    Raises:
        LabError: `tc` refused.
    """
    shaped = [(node.name, rate) for node in nodes if (rate := node.rate_bits_per_s) is not None]
    switch = Batch(
        tool="tc",
        lines=[_limit(network.port(name), rate) for name, rate in shaped],
        namespace=network.switch,
    )
    ends = [
        Batch(tool="tc", lines=[_limit(INTERFACE, rate)], namespace=network.namespace(name)) for name, rate in shaped
    ]
    segments = [
        Batch(tool="ip", lines=[_segments(INTERFACE, rate)], namespace=network.namespace(name)) for name, rate in shaped
    ]
    run_batches([switch, *ends, *segments])


def reshape(network: Network, node: str, rate_bits_per_s: float | None) -> None:
    """Give the link of one node another rate in both directions, or none; what waits at its ends is lost.

    Raises:
        LabError: `tc` refused.
    """
    ends = ((network.port(node), network.switch), (INTERFACE, network.namespace(node)))
    queues = [
        Batch(tool="tc", lines=_another_limit(interface, rate_bits_per_s), namespace=namespace)
        for interface, namespace in ends
    ]
    segments = Batch(tool="ip", lines=[_segments(INTERFACE, rate_bits_per_s)], namespace=network.namespace(node))
    run_batches([*queues, segments])


def _segments(interface: str, rate_bits_per_s: float | None) -> str:
    """Let TCP hand over no more at once than the bucket lets through, at least a frame.

    The kernel would cut it up, and each frame would then cost an interrupt at either end of the link: with four nodes
    at 100 Mbit/s an eighth of two cores, which real network cards would not take from training.
    """
    passed_bytes = math.inf if rate_bits_per_s is None else rate_bits_per_s / 8 * _BURST_S
    size_bytes = min(max(passed_bytes, FRAME_BYTES), _LARGEST_SEGMENT_BYTES)
    return f"link set dev {interface} gso_max_size {size_bytes:.0f}"


def _limit(interface: str, rate_bits_per_s: float) -> str:
    rate_bytes_per_s = rate_bits_per_s / 8
    burst_bytes = max(rate_bytes_per_s * _BURST_S, _BURST_FRAMES * FRAME_BYTES)
    queue_bytes = burst_bytes + max(rate_bytes_per_s * _QUEUE_S, _QUEUE_BYTES)
    return (
        f"qdisc replace dev {interface} root tbf rate {rate_bits_per_s:.0f}bit"
        f" burst {burst_bytes:.0f} limit {queue_bytes:.0f}"
    )


def _another_limit(interface: str, rate_bits_per_s: float | None) -> list[str]:
    """By way of a plain queue: a bucket made smaller while it holds a longer segment would never send that."""
    plain = f"qdisc replace dev {interface} root pfifo"
    if rate_bits_per_s is None:
        return [plain, f"qdisc del dev {interface} root"]
    return [plain, _limit(interface, rate_bits_per_s)]
