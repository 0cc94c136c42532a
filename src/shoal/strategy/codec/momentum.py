"""Adam's momentum in place of gradients: what a bucket carries where its codec works with the optimizer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Momentum:
    """One bucket's, all of shape (n,).

    Values are encoded in units of the root of Adam's second moment: so each matters to the codec as it does to the
    update.

    Attributes:
        mean: the momentum that all ranks hold.
        units: what values are divided by, above 0.
        decay: Adam's beta1.
        factor: by what gradients are scaled first, to clip them.
    """

    mean: Tensor
    units: Tensor
    decay: float
    factor: float = 1.0

    def part(self, gradients: Tensor, num_ranks: int) -> Tensor:
        """One rank's part of the next momentum, in units; the parts of all ranks add up to it."""
        part = gradients * ((1 - self.decay) * self.factor)
        return part.add_(self.mean, alpha=self.decay / num_ranks).div_(self.units)
