"""The shard axis: FSDP2 over a model's blocks, with gradients summed exactly as Shoal weighs them.

Zhao et al. 2023, PyTorch FSDP; torch.distributed.fsdp.fully_shard.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

from shoal.engine.layout.place import Place
from shoal.wire.group import Group

SMALLEST_GATHER_BYTES = 32 * 1024 * 1024
"""A model with less is gathered at once: waiting for each other costs more than it saves."""
LARGEST_GATHER_BYTES = 96 * 1024 * 1024
"""A block with more is gathered in parts, so that a rank's memory is its share and little more."""


def shard(model: nn.Module, blocks: Sequence[nn.Module], at: Place, *, bf16: bool) -> None:
    """Divide the parameters of a model over the axis shard, block by block; large blocks module by module.

    Args:
        blocks: modules to gather one at a time; those that are not the model's are passed over.
        bf16: gather parameters as bfloat16 and sum gradients in float32; what is held stays as it is.
        at: where this rank stands; of its plan `keep_gathered` and `offload`.
    """
    config, mesh = at.config, at.mesh["shard"]
    precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    place = CPUOffloadPolicy() if config.offload and mesh.device_type != "cpu" else OffloadPolicy()
    inside = set(model.modules())
    parts = [] if _size_bytes(model) < SMALLEST_GATHER_BYTES else [b for b in blocks if b in inside and b is not model]
    for part in [*_parts(parts), model]:
        # The outermost stays gathered in any case: backward begins where forward ended.
        reshard = None if part is model else not config.keep_gathered
        fully_shard(part, mesh=mesh, reshard_after_forward=reshard, mp_policy=precision, offload_policy=place)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Losses are divided by the global batch already: the sum over ranks is the gradient, whatever their shares.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(enable=True)
            module.set_reduce_scatter_unused_params(True)
            if at.gathering is not None:
                module.set_custom_all_gather(_Gather(at.gathering))
                module.set_custom_reduce_scatter(_ReduceScatter(at.gathering))


class _InView:
    """Of FSDP2's operations what both have."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _Gather(_InView, AllGather):
    """Waits in a view's group, and so no longer than the view lasts."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        self._group.gather_into(output_tensor, input_tensor)


class _ReduceScatter(_InView, ReduceScatter):
    """The same for gradients, which are only ever summed here."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        assert op == dist.ReduceOp.SUM
        self._group.reduce_scatter(output_tensor, input_tensor)


def _parts(blocks: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Modules to gather one at a time, those inside others first."""
    for block in blocks:
        if _size_bytes(block) > LARGEST_GATHER_BYTES:
            yield from _parts(child for child in block.children() if any(True for _ in child.parameters()))
        yield block


def _size_bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())
