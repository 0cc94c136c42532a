"""Divides a model over the ranks of a replica, axis by axis: pipeline, tensor, recomputing, shard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from shoal.engine.layout.recompute import recompute
from shoal.engine.layout.replica import Held, Replica
from shoal.engine.layout.sharding import shard
from shoal.engine.layout.usage import Usage
from shoal.errors import JobError
from shoal.strategy.layout.config import LayoutConfig
from shoal.strategy.layout.grid import AXES, WITHIN, Grid
from shoal.strategy.layout.region import Region


@dataclass(frozen=True)
class Place:
    """Where a rank stands.

    Attributes:
        mesh: the grid as torch.distributed sees it.
        group: the ranks of this rank's replica.
    """

    config: LayoutConfig
    grid: Grid
    rank: int
    mesh: DeviceMesh
    group: dist.ProcessGroup

    def index(self, axis: str) -> int:
        """This rank's place on one axis."""
        return self.grid.index(self.rank, axis)


def take_place(config: LayoutConfig, grid: Grid, rank: int, device: torch.device) -> Place:
    """Make the process groups of the grid. Collective."""
    mesh = DeviceMesh(device.type, torch.tensor(grid.ranks).reshape(grid.sizes), mesh_dim_names=AXES)
    own: dist.ProcessGroup | None = None
    for members in grid.groups(*WITHIN):  # every rank has to make every group
        group = dist.new_group(members)
        own = group if rank in members else own
    assert own is not None
    return Place(config, grid, rank, mesh, own)


def divide(model: nn.Module, place: Place, *, bf16: bool) -> Replica:
    """Keep of a model, equal on every rank, what this rank holds; collective."""
    config = place.config
    regions = {name: Region.whole(p.shape) for name, p in model.named_parameters()}
    copies = dict.fromkeys(regions, config.tensor)
    if config.recompute:
        recompute(model)
    if config.shard > 1:
        _check_shardable(model)
        shard(model, place.mesh["shard"], bf16=bf16, offload=config.offload)
        index = place.index("shard")
        regions = {name: region.of_rows(index, config.shard) for name, region in regions.items()}
    parameters = [_held(name, p, regions[name], copies[name]) for name, p in model.named_parameters()]
    usage = Usage(model) if config.shard > 1 else None
    speaks = place.index("tensor") == 0
    order = {name: index for index, name in enumerate(regions)}
    return Replica(model, parameters, group=place.group, speaks=speaks, order=order, usage=usage)


def _held(name: str, parameter: nn.Parameter, region: Region, copies: int) -> Held:
    if not isinstance(parameter, DTensor):
        return Held(name, parameter, parameter, region, copies)
    local = nn.Parameter(parameter._local_tensor.detach(), requires_grad=parameter.requires_grad)
    assert tuple(local.shape) == region.local_shape, f"{name}: torch holds {tuple(local.shape)}, expected {region}"
    return Held(name, parameter, local, region, copies)


def _check_shardable(model: nn.Module) -> None:
    scalars: Sequence[str] = [name for name, p in model.named_parameters() if p.dim() == 0]
    if scalars:
        raise JobError(
            f"the model's parameter {scalars[0]} is a single number without a dimension, which the shard axis cannot "
            "divide; give it the shape (1,)"
        )
