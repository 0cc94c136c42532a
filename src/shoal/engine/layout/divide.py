"""Divides a model over the ranks of a replica, axis by axis: pipeline, tensor, recomputing, shard."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from shoal.engine.layout.blocks import blocks
from shoal.engine.layout.deferred import Deferred
from shoal.engine.layout.pipeline.build import Tied, build_line, sum_tied
from shoal.engine.layout.pipeline.line import Line
from shoal.engine.layout.pipeline.trace import Traced
from shoal.engine.layout.place import Place
from shoal.engine.layout.recompute import recompute
from shoal.engine.layout.replica import Held, Replica, persistent_buffers
from shoal.engine.layout.sharding import shard
from shoal.engine.layout.tensor.apply import Call, Outcome, divide_tensors, record_calls
from shoal.engine.layout.tensor.rules import Split, find, given
from shoal.engine.layout.usage import Usage
from shoal.errors import JobError
from shoal.strategy.layout.region import Region

_NOTHING_TIED: Tied = {}


@dataclass(frozen=True)
class Divided:
    """What a model became.

    Attributes:
        pipeline: how this rank's stages run; None without a pipeline.
        left_whole: modules that the tensor axis could not divide, and why.
    """

    replica: Replica
    pipeline: tuple[Line, Traced] | None = None
    left_whole: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a job and its plan say about dividing the model.

    Attributes:
        example: makes the arguments of a call of the model, for one micro-batch; asked only where it is needed.
        rules: the job's own for the tensor axis; without, the table's.
        bf16: the forward computes in bfloat16.
        deferred: makes the values of parameters that are on the device meta.
    """

    example: Callable[[], tuple[tuple[Any, ...], Mapping[str, Any]]]
    rules: Mapping[str, str]
    bf16: bool
    deferred: Deferred | None = None


def divide(model: nn.Module, place: Place, task: Task) -> Divided:
    """Keep of a model, equal on every rank, what this rank holds. Collective."""
    config, whole = place.config, _Whole.of(model)
    tensors = _Tensors.plan(model, place, task) if config.tensor > 1 else None
    pipeline, tied = None, _NOTHING_TIED
    if config.pipeline > 1:
        line, traced, model, tied = build_line(model, place, whole.names, task.example(), bf16=task.bf16)
        pipeline = (line, traced)
    inner = {key: whole.names[id(p)] for key, p in model.named_parameters()}
    present = set(model.modules())
    outcome = tensors.apply(whole.modules, present) if tensors else Outcome()
    regions, copies = whole.after(outcome, tied, config.tensor)
    if config.recompute:
        recompute(block for block in whole.blocks if block in present)
    usage = None
    if config.shard > 1:
        _check_shardable(whole.regions)
        for root in list(model.children()) if config.pipeline > 1 else [model]:
            shard(root, whole.blocks, place, bf16=task.bf16)
        regions = {name: region.of_rows(place.index("shard"), config.shard) for name, region in regions.items()}
        usage = Usage(model, inner)
    _give_memory(model, place.device)
    found = {inner[key]: p for key, p in model.named_parameters()}
    parameters = [_held(name, found[name], regions[name], copies[name]) for name in whole.regions if name in found]
    if task.deferred is not None:
        _fill(parameters, task.deferred)
    own_buffers = {id(buffer) for buffer in model.buffers()}
    replica = Replica(
        model,
        parameters,
        buffers={name: buffer for name, buffer in whole.buffers.items() if id(buffer) in own_buffers},
        total=place.total,
        peers=place.peers,
        speaks=place.index("tensor") == 0 and place.index("pipeline") == config.pipeline - 1,
        after_backward=sum_tied(place, parameters, tied) if config.pipeline > 1 else None,
        order={name: index for index, name in enumerate(whole.regions)},
        usage=usage,
        tied=whole.tied,
        size=sum(region.num_values for region in whole.regions.values()),
    )
    return Divided(replica, pipeline, outcome.whole)


@dataclass(frozen=True)
class _Whole:
    """What is known of a model before it is divided.

    Attributes:
        names: of its parameters, by identity; `tied`: second names of some, and the first.
        regions: all of each parameter, in the model's order.
    """

    names: Mapping[int, str]
    tied: Mapping[str, str]
    regions: Mapping[str, Region]
    modules: Mapping[str, nn.Module]
    buffers: Mapping[str, Tensor]
    blocks: Sequence[nn.Module]

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """Look at a model."""
        names = {id(p): name for name, p in model.named_parameters()}
        every = {name: names[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
        return cls(
            names=names,
            tied={name: first for name, first in every.items() if name != first},
            regions={name: Region.whole(p.shape) for name, p in model.named_parameters()},
            modules=dict(model.named_modules()),
            buffers=persistent_buffers(model),
            blocks=list(blocks(model).values()),
        )

    def after(self, outcome: Outcome, tied: Tied, size: int) -> tuple[dict[str, Region], dict[str, int]]:
        """What a rank holds of each parameter, and how many ranks of its replica hold the same, before sharding.

        Args:
            outcome: of dividing over the tensor axis, which has `size` ranks.
            tied: what several stages of the pipeline hold.
        """
        regions = dict(self.regions)
        copies = {name: size * len(tied.get(name, (0,))) for name in regions}
        for name, region in outcome.regions.items():
            if name in regions and not region.is_whole:  # not a tied parameter's second name, nor a bias behind the sum
                regions[name], copies[name] = region, copies[name] // size
        return regions, copies


@dataclass(frozen=True)
class _Tensors:
    """What is going to be divided over the tensor axis: found in the whole model, done on this rank's part."""

    splits: list[Split]
    calls: dict[str, Call]
    mesh: DeviceMesh
    strict: bool

    @classmethod
    def plan(cls, model: nn.Module, place: Place, task: Task) -> Self:
        """Find the modules, and see what they compute."""
        # PyTorch's fast path of encoder layers passes over the modules inside, and knows no divided parameters.
        torch.backends.mha.set_fastpath_enabled(False)
        own = given(model, task.rules)
        splits = own or find(model)
        args, kwargs = task.example()
        owners = [split.owner for split in splits if split.owner]
        has_values = not any(p.is_meta for p in model.parameters())
        calls = record_calls(model, owners, lambda: model(*args, **kwargs)) if has_values else {}
        return cls(splits, calls, place.mesh["tensor"], strict=bool(own))

    def apply(self, modules: Mapping[str, nn.Module], present: Set[nn.Module]) -> Outcome:
        """Divide those of the model's modules that this rank has. Collective over the tensor axis."""
        here = {name: module for name, module in modules.items() if module in present or not name}
        return divide_tensors(here, self.splits, self.calls, self.mesh, strict=self.strict)


def _give_memory(model: nn.Module, device: torch.device) -> None:
    """Room for the parts of parameters that have no values yet."""
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)


def _fill(parameters: Sequence[Held], deferred: Deferred) -> None:
    """Make what was deferred, one whole parameter at a time, and keep this rank's part."""
    with torch.no_grad():
        for held in parameters:
            if held.name in deferred.names:
                held.local.copy_(held.region.take(deferred.make(held.name)))


def _held(name: str, parameter: nn.Parameter, region: Region, copies: int) -> Held:
    if not isinstance(parameter, DTensor):
        return Held(name, parameter, parameter, region, copies)
    local = nn.Parameter(parameter._local_tensor.detach(), requires_grad=parameter.requires_grad)
    assert tuple(local.shape) == region.local_shape, f"{name}: torch holds {tuple(local.shape)}, expected {region}"
    return Held(name, parameter, local, region, copies)


def _check_shardable(whole: Mapping[str, Region]) -> None:
    scalars = [name for name, region in whole.items() if not region.shape]
    if scalars:
        raise JobError(
            f"the model's parameter {scalars[0]} is a single number without a dimension, which the shard axis cannot "
            "divide; give it the shape (1,)"
        )
