"""Parameters in flat memory: which there are, and how a view of each looks. Where each lies: strategy/flat.py."""

from __future__ import annotations

from torch import Tensor, nn


def view_like(parameter: nn.Parameter, flat: Tensor, offset: int) -> Tensor:
    """A view of the parameter's shape, and of its memory layout (channels last, say) where that has no gaps."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
    if parameter.numel() == span:
        return flat.as_strided(parameter.shape, parameter.stride(), flat.storage_offset() + offset)
    return flat[offset : offset + parameter.numel()].view(parameter.shape)
