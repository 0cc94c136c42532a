"""Random numbers where values are divided: other ones on each rank of a tensor group.

Elsewhere the ranks of a group draw the same, since they compute the same. The numbers of a divided part are drawn
from a seed that the common generator gives, so that computing activations again draws them again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def apart(index: int, device: torch.device) -> Iterator[None]:
    """While it lasts rank `index` of the group draws numbers of its own; afterwards all go on alike."""
    seed = int(torch.randint(2**62, ()))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed + index)
        yield


def draw_apart(module: nn.Module, index: int) -> None:
    """Let a dropout whose input is divided draw by itself on each rank."""
    opened: list[Any] = []

    def before(_: nn.Module, args: tuple[Any, ...]) -> None:
        if module.training:
            opened.append(apart(index, args[0].device))
            opened[-1].__enter__()

    def after(_: nn.Module, __: tuple[Any, ...], ___: Any) -> None:
        if opened:
            opened.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after, always_call=True)
