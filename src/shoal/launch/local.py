"""All ranks on this machine, as one node: they share its memory."""

from __future__ import annotations

from shoal.launch.placement import Placement, Seating
from shoal.wire.addresses import LOOPBACK, on_network_of

NODE = "local"


def seating(num_ranks: int, port: int = 0, *, address: str = LOOPBACK, node: str = NODE) -> Seating:
    """Seat `num_ranks` ranks on this machine.

    Args:
        port: where rank 0 listens; 0 lets the operating system choose.
        address: this machine's IPv4 address at which all of the run's processes listen.
        node: this machine's name, which no other machine of the run may have.

    Raises:
        UsageError: no interface of this machine has the address.
    """
    network = on_network_of(address)
    placements = tuple(Placement(rank=rank, node=node, local_rank=rank, env=network) for rank in range(num_ranks))
    return Seating(placements=placements, address=address, port=port, coordinator_address=address)
