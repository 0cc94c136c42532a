"""Where a rank stands in the grid, and the process groups that go with it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shoal.strategy.layout.config import LayoutConfig
from shoal.strategy.layout.grid import AXES, WITHIN, Grid
from shoal.wire.group import Group
from shoal.wire.groups import World


@dataclass(frozen=True)
class Place:
    """Where a rank stands.

    Attributes:
        device: where this rank computes.
        mesh: the grid as torch.distributed sees it.
        total: adds a tensor up in place over the ranks of this rank's replica.
        peers: the ranks of all replicas that stand here in the pipeline; None: all ranks.
        gathering: the axis shard's, where it ends with a view; None: the mesh's own.
    """

    config: LayoutConfig
    grid: Grid
    rank: int
    device: torch.device
    mesh: DeviceMesh
    total: Callable[[Tensor], object]
    peers: dist.ProcessGroup | None
    gathering: Group | None = None

    def index(self, axis: str) -> int:
        """This rank's place on one axis."""
        return self.grid.index(self.rank, axis)


def take_place(config: LayoutConfig, grid: Grid, rank: int, device: torch.device) -> Place:
    """Make the process groups of the grid. Collective."""
    mesh = DeviceMesh(device.type, torch.tensor(grid.ranks).reshape(grid.sizes), mesh_dim_names=AXES)
    within, peers = (_group(grid.groups(*axes), rank) for axes in (WITHIN, ("replicate", "shard", "tensor")))
    return Place(config, grid, rank, device, mesh, functools.partial(dist.all_reduce, group=within), peers)


def take_place_in_view(config: LayoutConfig, grid: Grid, world: World, device: torch.device) -> Place | None:
    """The same over groups that end with a view; None if nothing is divided. Only for the axis shard. Collective.

    Raises:
        PeerLostError: a rank could not be reached, or the view was cut.
    """
    if config.ranks_per_replica == 1:
        return None
    members = grid.group(world.rank, "shard")
    gathering, within = (world.group(f"shard/{use}", members) for use in ("model", "sums"))
    group = world.process_group(gathering)
    places, own = torch.arange(len(members)), members.index(world.rank)
    mesh = DeviceMesh(device.type, places, mesh_dim_names=("shard",), _init_backend=False, _rank=own)
    # What DeviceMesh.from_group does, less its look at global ranks, which a group of a view does not have.
    mesh._dim_group_names = [group.group_name]
    mesh._pg_registry[group.group_name] = group
    return Place(config, grid, world.rank, device, mesh, within.all_reduce, None, gathering)


def _group(groups: list[list[int]], rank: int) -> dist.ProcessGroup:
    """This rank's of these groups; every rank has to make every one."""
    made = [dist.new_group(members) for members in groups]
    group: dist.ProcessGroup = next(g for g, members in zip(made, groups, strict=True) if rank in members)
    return group
