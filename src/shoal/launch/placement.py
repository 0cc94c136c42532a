"""Where one rank runs: what every launcher hands to the supervisor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Placement:
    """One rank's seat.

    Attributes:
        rank: global rank, 0 to world size - 1.
        node: the node's name; ranks of one node share memory, ranks of different nodes talk over the network.
        local_rank: rank within the node.
        prefix: put before the worker's command line; it must end by exec-ing what follows, so that the process
            id stays the worker's.
        env: added to the worker's environment (`GLOO_SOCKET_IFNAME`, ...).
    """

    rank: int
    node: str
    local_rank: int
    prefix: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Seating:
    """All ranks' seats and where they meet.

    Attributes:
        placements: in order of rank.
        address: where rank 0 listens for the others.
        port: 0 lets the operating system choose (possible only where every rank shares one network stack).
        coordinator_address: where a coordinator of elastic ranks listens for them.
        coordinator_prefix: put before its command line, as for a placement.
    """

    placements: tuple[Placement, ...]
    address: str
    port: int
    coordinator_address: str = "127.0.0.1"
    coordinator_prefix: tuple[str, ...] = ()
