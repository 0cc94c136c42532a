"""The transports of one lane: to the ranks that hold the same part of the other replicas."""

from __future__ import annotations

import torch

from shoal.ops import LEADERS, NODE, WORLD
from shoal.strategy.layout.grid import Grid
from shoal.strategy.topology import Topology
from shoal.wire import shared_memory
from shoal.wire.collectives import TorchTransport
from shoal.wire.groups import SILENCE_TIMEOUT_S, World
from shoal.wire.transport import MemoryPool, Transport


class Lanes:
    """Makes lanes; all ranks make the same ones in the same order."""

    def __init__(
        self,
        topology: Topology,
        grid: Grid,
        world: World,
        device: torch.device,
        *,
        verify: bool = False,
        pool: MemoryPool | None = None,
    ) -> None:
        """`verify`: checksums go with messages. `pool`: where their memory comes from."""
        self._verify, self._pool = verify, pool
        self._topology = topology
        self._own = grid.group(topology.rank, "replicate")
        self._world = world
        self._device = device

    def build(self, lane: int, groups: set[str]) -> dict[str, Transport]:
        """The transports by group. Collective over all ranks."""
        transports: dict[str, Transport] = {}
        if WORLD in groups:
            transports[WORLD] = self._over(lane, WORLD, self._own)
        if LEADERS in groups and self._topology.rank in self._leaders():
            transports[LEADERS] = self._over(lane, LEADERS, self._leaders())
        if NODE in groups:
            transports[NODE] = self._node(lane)
        return transports

    def _over(self, lane: int, name: str, members: list[int]) -> Transport:
        group = self._world.group(f"{lane}/{name}", members, on_lane=True)
        return TorchTransport(group, self._device, verify=self._verify, pool=self._pool)

    def _node(self, lane: int) -> Transport:
        local = self._neighbours()
        if self._device.type == "cuda" or not shared_memory.available():
            return self._over(lane, NODE, local)
        store, prefix = self._world.store, f"lane/{lane}/node/{local[0]}/"
        transport = shared_memory.SharedMemoryTransport(
            local.index(self._topology.rank),
            len(local),
            lambda key, value: store.set(prefix + key, value.hex()),
            lambda key: bytes.fromhex(store.get(prefix + key).decode()),
            timeout_s=SILENCE_TIMEOUT_S,
        )
        self._world.on_cut(transport.cut)
        self._world.on_close(transport.unmap)
        return transport

    def _neighbours(self) -> list[int]:
        """The own group's ranks on this rank's node."""
        nodes = self._topology.nodes
        return [rank for rank in self._own if nodes[rank] == nodes[self._topology.rank]]

    def _leaders(self) -> list[int]:
        """The own group's first rank on each node."""
        first: dict[str, int] = {}
        for rank in self._own:
            first.setdefault(self._topology.nodes[rank], rank)
        return list(first.values())
