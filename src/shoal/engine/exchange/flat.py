"""Parameters in flat memory: which lie together, where each begins, and how a view of it looks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

NamedParameter = tuple[str, nn.Parameter]
_ALIGNMENT_BYTES = 64


def group(parameters: Sequence[NamedParameter], bucket_bytes: float) -> list[list[NamedParameter]]:
    """Cut the list where a bucket holds `bucket_bytes` or the dtype changes."""
    groups: list[list[NamedParameter]] = []
    size = 0
    for name, parameter in parameters:
        if not groups or size >= bucket_bytes or groups[-1][-1][1].dtype != parameter.dtype:
            groups.append([])
            size = 0
        groups[-1].append((name, parameter))
        size += size_bytes(parameter)
    return groups


def offsets(sizes: Sequence[int], item_bytes: int) -> tuple[list[int], int]:
    """Where each of so many values starts, aligned for vector instructions, and the total."""
    unit = max(1, _ALIGNMENT_BYTES // item_bytes)
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += -(-size // unit) * unit
    return starts, end


def view_like(parameter: nn.Parameter, flat: Tensor, offset: int) -> Tensor:
    """A view of the parameter's shape, and of its memory layout (channels last, say) where that has no gaps."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
    if parameter.numel() == span:
        return flat.as_strided(parameter.shape, parameter.stride(), flat.storage_offset() + offset)
    return flat[offset : offset + parameter.numel()].view(parameter.shape)


def size_bytes(parameter: nn.Parameter) -> int:
    """The bytes of its values."""
    return parameter.numel() * parameter.element_size()


def trainable(model: nn.Module) -> list[NamedParameter]:
    """Each tensor once (tied parameters have one name), frozen ones left out."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]
