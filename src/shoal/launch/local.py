"""All ranks on this machine, as one node: they share its memory."""

from __future__ import annotations

import sys

from shoal.launch.placement import Placement, Seating


def seating(num_ranks: int, port: int = 0) -> Seating:
    """Seat `num_ranks` ranks on this machine.

    Args:
        port: where rank 0 listens on the loopback address; 0 lets the operating system choose.
    """
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    placements = tuple(
        Placement(rank=rank, node="local", local_rank=rank, env={"GLOO_SOCKET_IFNAME": loopback})
        for rank in range(num_ranks)
    )
    return Seating(placements=placements, address="127.0.0.1", port=port)
