"""Where a rank stands in the grid, and the process groups that go with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from shoal.strategy.layout.config import LayoutConfig
from shoal.strategy.layout.grid import AXES, WITHIN, Grid


@dataclass(frozen=True)
class Place:
    """Where a rank stands.

    Attributes:
        device: where this rank computes.
        mesh: the grid as torch.distributed sees it.
        group: the ranks of this rank's replica; `peers`: the ranks of all replicas that stand here in the pipeline.
    """

    config: LayoutConfig
    grid: Grid
    rank: int
    device: torch.device
    mesh: DeviceMesh
    group: dist.ProcessGroup
    peers: dist.ProcessGroup

    def index(self, axis: str) -> int:
        """This rank's place on one axis."""
        return self.grid.index(self.rank, axis)


def take_place(config: LayoutConfig, grid: Grid, rank: int, device: torch.device) -> Place:
    """Make the process groups of the grid. Collective."""
    mesh = DeviceMesh(device.type, torch.tensor(grid.ranks).reshape(grid.sizes), mesh_dim_names=AXES)
    group, peers = (_group(grid.groups(*axes), rank) for axes in (WITHIN, ("replicate", "shard", "tensor")))
    return Place(config, grid, rank, device, mesh, group, peers)


def _group(groups: list[list[int]], rank: int) -> dist.ProcessGroup:
    """This rank's of these groups; every rank has to make every one."""
    made = [dist.new_group(members) for members in groups]
    group: dist.ProcessGroup = next(g for g, members in zip(made, groups, strict=True) if rank in members)
    return group
