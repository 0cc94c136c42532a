"""`nn.MultiheadAttention` over the tensor axis: its projections are one parameter and its forward counts heads, so
PyTorch's styles cannot divide it."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import functional

from shoal.engine.layout.tensor.dice import apart
from shoal.strategy.layout.region import Region


def obstacle(module: nn.MultiheadAttention, size: int) -> str | None:
    """Why this one cannot be divided; None if it can."""
    if module.num_heads % size:
        return f"num_heads = {module.num_heads} does not divide by {size}"
    if not module._qkv_same_embed_dim or module.bias_k is not None or module.add_zero_attn:
        return "its keys or values have another size, or a bias of their own"
    return None


def divide(module: nn.MultiheadAttention, mesh: DeviceMesh) -> None:
    """Give each rank its heads: the matching rows of the projections, the matching columns of the output's."""
    for key in ("in_proj_weight", "in_proj_bias"):
        whole = getattr(module, key)
        if whole is not None:
            # Chunk r of the shuffled matrix is rank r's part of the queries', the keys' and the values'.
            shuffled = whole.detach().unflatten(0, (3, mesh.size(), -1)).transpose(0, 1).flatten(0, 2).contiguous()
            _put(module, key, shuffled, mesh, Shard(0))
    _put(module.out_proj, "weight", module.out_proj.weight.detach(), mesh, Shard(1))
    if module.out_proj.bias is not None:
        _put(module.out_proj, "bias", module.out_proj.bias.detach(), mesh, Replicate())
    module.forward = functools.partial(_forward, module, mesh)  # type: ignore[method-assign]


def regions(module: nn.MultiheadAttention, name: str, index: int, size: int) -> dict[str, Region]:
    """What rank `index` holds."""
    found = {}
    for key, parameter in module.named_parameters():
        whole = Region.whole(parameter.shape)
        if key.startswith("in_proj"):
            whole = whole.of_fused_rows(index, size, 3)
        elif key == "out_proj.weight":
            whole = whole.of_columns(index, size)
        found[f"{name}.{key}"] = whole
    return found


def _put(module: nn.Module, key: str, whole: Tensor, mesh: DeviceMesh, placement: Any) -> None:
    divided = distribute_tensor(whole, mesh, [placement])
    setattr(module, key, nn.Parameter(divided, getattr(module, key).requires_grad))


def _forward(
    module: nn.MultiheadAttention,
    mesh: DeviceMesh,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, None]:
    """As `nn.MultiheadAttention.forward` without weights, on this rank's heads."""
    del average_attn_weights
    if need_weights or query.dim() != 3:
        raise ValueError("attention weights, or a batch without its dimension, are asked for")
    if not module.batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    weights, biases = module.in_proj_weight, module.in_proj_bias
    if query is key is value:
        projected = _linear(query, weights, biases, mesh).chunk(3, dim=-1)
    else:
        projected = tuple(_linear(x, weights, biases, mesh).chunk(3, -1)[i] for i, x in enumerate((query, key, value)))
    # (batch, length, heads here, dim of a head) -> (batch, heads here, length, dim of a head)
    queries, keys, values = (x.unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for x in projected)
    mask = _mask(module, attn_mask, key_padding_mask, query.shape[0], queries, mesh)
    dropout = module.dropout if module.training else 0.0
    with apart(mesh.get_local_rank(), query.device) if dropout else contextlib.nullcontext():
        attended = functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, dropout_p=dropout, is_causal=is_causal and mask is None
        )
    joined = DTensor.from_local(attended.transpose(1, 2).flatten(2), mesh, [Shard(-1)], run_check=False)
    partial: Any = functional.linear(joined, module.out_proj.weight, module.out_proj.bias)
    output = partial.redistribute(placements=[Replicate()]).to_local()
    return (output if module.batch_first else output.transpose(0, 1)), None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, mesh: DeviceMesh) -> Tensor:
    everywhere = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    divided: Any = functional.linear(everywhere, weight, bias)
    local: Tensor = divided.to_local()
    return local


def _mask(
    module: nn.MultiheadAttention,
    attention: Tensor | None,
    padding: Tensor | None,
    batch: int,
    queries: Tensor,
    mesh: DeviceMesh,
) -> Tensor | None:
    """Both masks as one that is added, or None; of a mask for each head, this rank's."""
    masks = []
    if attention is not None:
        if attention.dim() == 3:
            local = queries.shape[1]
            first = mesh.get_local_rank() * local
            attention = attention.unflatten(0, (batch, module.num_heads))[:, first : first + local]
        masks.append(_added(attention, queries))
    if padding is not None:
        masks.append(_added(padding, queries)[:, None, None, :])
    return sum(masks[1:], masks[0]) if masks else None


def _added(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype is not like.dtype and not mask.is_floating_point():
        return like.new_zeros(mask.shape).masked_fill(mask, float("-inf"))
    return mask.to(like.dtype)
