"""Divides a model over the ranks of a replica, axis by axis: pipeline, tensor, recomputing, shard."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shoal.engine.layout.blocks import blocks
from shoal.engine.layout.pipeline.build import build_line, sum_tied
from shoal.engine.layout.pipeline.line import Line
from shoal.engine.layout.pipeline.trace import Call, Traced
from shoal.engine.layout.place import Place
from shoal.engine.layout.recompute import recompute
from shoal.engine.layout.replica import Held, Replica, persistent_buffers
from shoal.engine.layout.sharding import shard
from shoal.engine.layout.usage import Usage
from shoal.errors import JobError
from shoal.strategy.layout.region import Region


@dataclass(frozen=True)
class Divided:
    """What a model became.

    Attributes:
        pipeline: how this rank's stages run; None without a pipeline.
    """

    replica: Replica
    pipeline: tuple[Line, Traced] | None = None


def divide(model: nn.Module, place: Place, *, bf16: bool, example: Callable[[], Call]) -> Divided:
    """Keep of a model, equal on every rank, what this rank holds. Collective.

    Args:
        bf16: the forward computes in bfloat16.
        example: what one micro-batch calls the model with; asked only for a pipeline.
    """
    config = place.config
    order = {name: index for index, name in enumerate(dict(model.named_parameters()))}
    known = {id(p): name for name, p in model.named_parameters()}
    regions = {name: Region.whole(p.shape) for name, p in model.named_parameters()}
    whole_regions = regions
    copies = dict.fromkeys(regions, config.tensor)
    parts = list(blocks(model).values())
    if config.recompute:
        recompute(parts)
    pipeline, after_backward = None, None
    whole = model
    if config.pipeline > 1:
        line, traced, model, tied = build_line(model, place, known, example(), bf16=bf16)
        pipeline = (line, traced)
        copies |= {name: copies[name] * len(ranks) for name, ranks in tied.items()}
    names = {inner: known[id(p)] for inner, p in model.named_parameters()}
    buffers = _buffers(whole, model)
    usage = None
    if config.shard > 1:
        _check_shardable(names.values(), model)
        roots = list(model.children()) if config.pipeline > 1 else [model]
        for root in roots:
            shard(root, parts, place.mesh["shard"], bf16=bf16, offload=config.offload)
        index = place.index("shard")
        regions = {name: region.of_rows(index, config.shard) for name, region in regions.items()}
        usage = Usage(model, names)
    found = {names[inner]: p for inner, p in model.named_parameters()}
    parameters = [_held(name, found[name], regions[name], copies[name]) for name in order if name in found]
    if config.pipeline > 1:
        after_backward = sum_tied(place, parameters, tied)
    speaks = place.index("tensor") == 0 and place.index("pipeline") == config.pipeline - 1
    replica = Replica(
        model,
        parameters,
        buffers=buffers,
        group=place.group,
        speaks=speaks,
        after_backward=after_backward,
        peers=place.peers,
        order=order,
        size=sum(math.prod(region.shape) for region in whole_regions.values()),
        usage=usage,
    )
    return Divided(replica, pipeline)


def _buffers(whole: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """The persistent buffers that this rank has, by their names in the whole model."""
    names = {id(buffer): name for name, buffer in persistent_buffers(whole).items()}
    return {names[id(buffer)]: buffer for buffer in model.buffers() if id(buffer) in names}


def _held(name: str, parameter: nn.Parameter, region: Region, copies: int) -> Held:
    if not isinstance(parameter, DTensor):
        return Held(name, parameter, parameter, region, copies)
    local = nn.Parameter(parameter._local_tensor.detach(), requires_grad=parameter.requires_grad)
    assert tuple(local.shape) == region.local_shape, f"{name}: torch holds {tuple(local.shape)}, expected {region}"
    return Held(name, parameter, local, region, copies)


def _check_shardable(names: Iterable[str], model: nn.Module) -> None:
    scalars = [name for name, p in zip(names, model.parameters(), strict=True) if p.dim() == 0]
    if scalars:
        raise JobError(
            f"the model's parameter {scalars[0]} is a single number without a dimension, which the shard axis cannot "
            "divide; give it the shape (1,)"
        )
