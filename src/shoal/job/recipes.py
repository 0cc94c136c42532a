"""Two things nearly every job wants: weight decay on matrices only, and a warm-up of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups that decay matrices and embeddings but not biases and norms (parameters of fewer than 2 dims).

    Args:
        weight_decay: for the first group; the second has 0.
    """
    everything = list(parameters)
    decayed = [p for p in everything if p.dim() >= 2]
    others = [p for p in everything if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def warmup(steps: int, *, total: int | None = None, floor: float = 0.0) -> Callable[[Optimizer], LambdaLR]:
    """A schedule: linear up to the optimizer's rate over `steps`, then constant, or a cosine down if `total` is given.

    Args:
        steps: warm-up steps, >= 0.
        total: the step at which the cosine (Loshchilov and Hutter 2017) reaches its floor, and stays there.
        floor: the cosine's end, as a fraction of the optimizer's rate, 0 to 1.
    """

    def factor(step: int) -> float:
        if step < steps:
            return (step + 1) / steps
        if total is None:
            return 1.0
        progress = min(1.0, (step - steps) / max(1, total - steps))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return lambda optimizer: LambdaLR(optimizer, factor)
