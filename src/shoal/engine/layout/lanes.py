"""The transports of one lane: to the ranks that hold the same part of the other replicas."""

from __future__ import annotations

import torch
from torch.distributed import Store

from shoal.ops import LEADERS, NODE, WORLD
from shoal.strategy.layout.grid import Grid
from shoal.strategy.topology import Topology
from shoal.wire import shared_memory
from shoal.wire.collectives import TorchTransport
from shoal.wire.rendezvous import SILENCE_TIMEOUT_S
from shoal.wire.transport import Transport


class Lanes:
    """Makes lanes; all ranks make the same ones in the same order."""

    def __init__(self, world: Topology, grid: Grid, store: Store, device: torch.device) -> None:
        self._world = world
        self._groups = grid.groups("replicate")
        self._own = grid.group(world.rank, "replicate")
        self._store = store
        self._device = device

    def build(self, lane: int, groups: set[str]) -> dict[str, Transport]:
        """The transports by group. Collective over all ranks."""
        transports: dict[str, Transport] = {}
        if WORLD in groups:
            transports[WORLD] = self._over(self._groups, self._own)
        if LEADERS in groups:
            transports[LEADERS] = self._over([self._leaders(group) for group in self._groups], self._leaders(self._own))
        if NODE in groups:
            transports[NODE] = self._node(lane)
        return transports

    def _over(self, groups: list[list[int]], own: list[int]) -> Transport:
        """A group of torch.distributed; every rank has to make every one, its own or not."""
        made = [TorchTransport(members, self._world.rank, self._device) for members in groups]
        return made[groups.index(own)]

    def _node(self, lane: int) -> Transport:
        local = self._neighbours(self._own)
        if self._device.type == "cpu" and shared_memory.available():
            prefix = f"lane/{lane}/node/{local[0]}/"
            return shared_memory.SharedMemoryTransport(
                local.index(self._world.rank),
                len(local),
                lambda key, value: self._store.set(prefix + key, value.hex()),
                lambda key: bytes.fromhex(self._store.get(prefix + key).decode()),
                timeout_s=SILENCE_TIMEOUT_S,
            )
        groups = [
            [rank for rank in group if self._world.nodes[rank] == node]
            for group in self._groups
            for node in dict.fromkeys(self._world.nodes[rank] for rank in group)
        ]
        return self._over(groups, local)

    def _neighbours(self, group: list[int]) -> list[int]:
        """The ranks of a group on this rank's node."""
        return [rank for rank in group if self._world.nodes[rank] == self._world.nodes[self._world.rank]]

    def _leaders(self, group: list[int]) -> list[int]:
        """The first rank of a group on each node."""
        first: dict[str, int] = {}
        for rank in group:
            first.setdefault(self._world.nodes[rank], rank)
        return list(first.values())
