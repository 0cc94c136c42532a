"""How long the ranks of a pipeline stand still in theory, as a part of a step's time."""

from __future__ import annotations

from shoal.strategy.layout.config import LayoutConfig


def bubble(config: LayoutConfig) -> float:
    """The idle part, 0 <= bubble < 1, if all stages and all micro-batches take the same time and links take none.

    With p ranks, m micro-batches and v stages a rank: (p - 1) / (v m + p - 1) (Narayanan et al. 2021); a zero-bubble
    schedule fills it with gradients of weights, of which a third of the gap is left where forward, backward for inputs
    and backward for weights take the same time (ZB-H1 of Qi et al. 2023).
    """
    ranks, work = config.pipeline, config.stages * (config.micro_batches or 1)
    gap = (ranks - 1) / 3 if config.schedule == "zero_bubble" else ranks - 1
    return gap / (work + gap)
