"""Divides modules over the tensor axis by PyTorch's own styles, and sees for itself that each still computes the same.

A rule goes by names, and a name may deceive: so every split is tried on the inputs that the module had in a run of the
whole model, and taken back if the outputs differ or the module fails.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from shoal.engine.layout.tensor import attention
from shoal.engine.layout.tensor.dice import draw_apart
from shoal.engine.layout.tensor.rules import LEAST_ROWS, Split
from shoal.errors import JobError
from shoal.strategy.layout.region import Region
from shoal.wire.groups import failures_as_lost_peers

_STYLES: dict[str, Callable[[], ParallelStyle]] = {
    "columns": ColwiseParallel,
    "fused": ColwiseParallel,
    "rows": RowwiseParallel,
    "vocabulary": lambda: RowwiseParallel(input_layouts=Replicate()),
    "head": lambda: ColwiseParallel(output_layouts=Replicate()),
}
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass
class Outcome:
    """What became of the rules.

    Attributes:
        regions: by parameter's name in the whole model, what this rank holds of those that were divided.
        whole: modules that stay whole on every rank, and why.
    """

    regions: dict[str, Region] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)


@dataclass
class Call:
    """One call of a module, to be compared with."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any


def record_calls(model: nn.Module, owners: Sequence[str], run: Callable[[], object]) -> dict[str, Call]:
    """The first call of each of these modules while `run` computes, in evaluation mode."""
    calls: dict[str, Call] = {}
    named = dict(model.named_modules())

    def hook(name: str) -> Callable[[nn.Module, Any, Any, Any], None]:
        def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            calls.setdefault(name, Call(args, kwargs, output))

        return after

    hooks = [named[name].register_forward_hook(hook(name), with_kwargs=True) for name in dict.fromkeys(owners)]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            run()
    finally:
        model.train(training)
        for handle in hooks:
            handle.remove()
    return calls


def divide_tensors(
    modules: Mapping[str, nn.Module],
    splits: Sequence[Split],
    calls: Mapping[str, Call],
    mesh: DeviceMesh,
    *,
    strict: bool,
) -> Outcome:
    """Divide what the splits name. Collective over `mesh`.

    Args:
        modules: this rank's, by their names in the whole model; splits of others are passed over.
        calls: by owner; a split without one is taken as it is.
        strict: the splits are the job's own: what cannot be divided is an error.

    Raises:
        JobError: with `strict`, naming the module and the dimension.
    """
    outcome = Outcome()
    for split in splits:
        if not all(name in modules for name in (split.owner, *split.modules)):
            continue
        reason = _obstacle(modules, split, mesh.size(), choosy=not strict)
        if reason is None:
            reason = _try(modules, split, calls.get(split.owner), mesh)
        if reason is None:
            outcome.regions |= _regions(modules, split, mesh)
            for name in split.between:
                draw_apart(modules[name], mesh.get_local_rank())
        elif strict:
            raise JobError(f"Job(tensor=...): {', '.join(split.modules)} cannot be divided: {reason}")
        else:
            outcome.whole |= dict.fromkeys(split.modules, reason)
    return outcome


def _obstacle(modules: Mapping[str, nn.Module], split: Split, size: int, *, choosy: bool) -> str | None:
    """Why a split cannot be."""
    for name, how in split.modules.items():
        module = modules[name]
        if how == "attention" and isinstance(module, nn.MultiheadAttention):
            reason = attention.obstacle(module, size)
            if reason is not None:
                return f"{name} cannot: {reason}"
            continue
        if not isinstance(module, nn.Embedding if how == "vocabulary" else nn.Linear):
            return f"{name} is a {type(module).__name__}"
        rows, columns = module.weight.shape
        length = columns if how == "rows" else rows
        pieces = size * (split.fused if how == "fused" else 1)
        if length % pieces:
            return f"{name}'s dimension of {length} does not divide into {pieces}"
        if how == "vocabulary" and choosy and rows // size < LEAST_ROWS:
            return f"{name} has only {rows} rows"
    owner = modules[split.owner]
    for key in split.heads:
        if getattr(owner, key) % size:
            return f"{split.owner}'s {key} = {getattr(owner, key)} does not divide by {size}"
    return None


def _try(modules: Mapping[str, nn.Module], split: Split, call: Call | None, mesh: DeviceMesh) -> str | None:
    """Divide; take it back and say why if the owner does not compute the same any more."""
    owner = modules[split.owner]
    reason = None
    for heads in dict.fromkeys([split.heads, ()]):
        touched = [part for name in split.modules for part in modules[name].modules()]
        kept = _keep(touched, owner, split.heads)
        reason = None
        try:
            _divide(modules, split, heads, mesh)
            if call is not None:
                difference = _difference(owner, call)
                reason = None if difference is None else f"{split.owner} would compute something else ({difference})"
        except (RuntimeError, ValueError, AssertionError) as error:
            reason = f"{split.owner} cannot compute with a part of it: {str(error).partition(chr(10))[0]}"
        if not _any_fails(mesh, failed=reason is not None):
            return None
        _put_back(kept, owner)
    return reason or f"another rank could not divide {split.owner}"


def _divide(modules: Mapping[str, nn.Module], split: Split, heads: Sequence[str], mesh: DeviceMesh) -> None:
    for name, how in split.modules.items():
        module = modules[name]
        if isinstance(module, nn.MultiheadAttention):
            attention.divide(module, mesh)
            continue
        if how == "fused":
            _shuffle(module, mesh.size(), split.fused)
        parallelize_module(module, mesh, _STYLES[how]())
    for key in heads:
        setattr(modules[split.owner], key, getattr(modules[split.owner], key) // mesh.size())
    _keep_tied(modules, split)


def _keep_tied(modules: Mapping[str, nn.Module], split: Split) -> None:
    """An embedding and a head that were one parameter stay one."""
    vocabulary = [modules[name] for name, how in split.modules.items() if how == "vocabulary"]
    for name, how in split.modules.items():
        if how == "head" and vocabulary:
            modules[name].weight = vocabulary[0].weight


def _shuffle(module: nn.Module, size: int, fused: int) -> None:
    """Stacked matrices, so that a rank's chunk has its part of each: of q, of k, of v."""
    for key, parameter in list(module.named_parameters(recurse=False)):
        blocks = parameter.detach().unflatten(0, (fused, size, -1))  # (fused, rank, rows, ...)
        shuffled = nn.Parameter(blocks.transpose(0, 1).flatten(0, 2).contiguous(), parameter.requires_grad)
        setattr(module, key, shuffled)


def _regions(modules: Mapping[str, nn.Module], split: Split, mesh: DeviceMesh) -> dict[str, Region]:
    index, size = mesh.get_local_rank(), mesh.size()
    regions: dict[str, Region] = {}
    for name, how in split.modules.items():
        module = modules[name]
        if isinstance(module, nn.MultiheadAttention):
            regions |= attention.regions(module, name, index, size)
            continue
        for key, parameter in modules[name].named_parameters(recurse=False):
            whole = Region.whole(parameter.shape)
            if how == "fused":
                regions[f"{name}.{key}"] = whole.of_fused_rows(index, size, split.fused)
            elif how == "rows":
                regions[f"{name}.{key}"] = whole.of_columns(index, size) if parameter.dim() == 2 else whole
            else:
                regions[f"{name}.{key}"] = whole.of_rows(index, size)
    return regions


_Kept = list[tuple[nn.Module, dict[str, Any]]]
_STATE = (
    "_parameters",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
)


def _keep(modules: Sequence[nn.Module], owner: nn.Module, heads: Sequence[str]) -> _Kept:
    states: _Kept = [(module, {key: getattr(module, key).copy() for key in _STATE}) for module in modules]
    return [*states, (owner, {key: getattr(owner, key) for key in heads})]


def _put_back(kept: _Kept, owner: nn.Module) -> None:
    for module, state in kept:
        module.__dict__.pop("forward", None)
        for key, value in state.items():
            if module is owner and not isinstance(value, dict):
                setattr(owner, key, value)
            else:
                getattr(module, key).clear()
                getattr(module, key).update(value)


def _difference(owner: nn.Module, call: Call) -> str | None:
    """How far the owner's outputs are from what they were; None if they are the same."""
    training = owner.training
    owner.eval()
    with torch.no_grad():
        output = owner(*call.args, **call.kwargs)
    owner.train(training)
    for got, expected in zip(_tensors(output), _tensors(call.output), strict=True):
        if got.shape != expected.shape:
            return f"of shape {tuple(got.shape)} in place of {tuple(expected.shape)}"
        far = float((got.double() - expected.double()).abs().max()) if got.numel() else 0.0
        most = float(expected.double().abs().max()) if got.numel() else 0.0
        if far > _TOLERANCE.get(expected.dtype, 1e-3) * max(most, 1e-6):
            return f"off by {far:.2g} of {most:.2g}"
    return None


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _any_fails(mesh: DeviceMesh, *, failed: bool) -> bool:
    flag = torch.tensor([float(failed)], device=mesh.device_type)
    with failures_as_lost_peers("agreeing which modules to divide"):
        dist.all_reduce(flag, group=mesh.get_group())
    return bool(flag.item() > 0)
