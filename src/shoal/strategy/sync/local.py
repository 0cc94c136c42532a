"""Local steps: every rank trains by itself, and now and then the ranks average what they have learned.

*Local SGD* (Stich 2019) averages the parameters every H steps. *DiLoCo* (Douillard et al. 2023) takes the averaged
difference from the last agreed parameters, the anchor, as a gradient for an outer optimizer with Nesterov momentum;
with an outer rate of 1 and no momentum that is local SGD again. *Streaming* (Douillard et al. 2025) exchanges fragments
of the model in turn, in the background, and merges each tau steps after it left, so that a slow link stops no step.

What a rank has learned since a fragment left is kept when the fragment is merged, in one of two ways: *carry* puts it
on top of the new anchor (CoCoD-SGD, Shen et al. 2019), *mix* takes the mean of the two (streaming DiLoCo).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import pydantic
from torch import Tensor

from shoal.strategy.codec.feedback import Coder
from shoal.strategy.sync.algorithms import Algorithm
from shoal.strategy.sync.summation import Form, Summation
from shoal.strategy.topology import Topology
from shoal.strict_toml import STRICT

Count = Annotated[int, pydantic.Field(ge=1, le=1_000_000)]
_AUTO_FRAGMENTS = 4
MEASURED_STEPS = range(3, 9)
"""Where H is "auto": the steps that are timed; after the last of them the largest fragment is exchanged, to time it."""
TIMED_EXCHANGES = 2
"""How often it is: the last one counts."""


@dataclass(frozen=True, kw_only=True)
class LocalConfig:
    """`[sync] kind = "local"`.

    Attributes:
        every: H, the steps between two exchanges of the same part of the model; "auto" measures the network and the
            first steps, and takes the least H at which the links keep up.
        fragments: the parts of the model that are exchanged in turn; "auto" is 4 (1 where every is below 4).
        overlap: tau, the steps between a fragment's leaving and its merging; 0 waits for it at once; "auto" is the time
            until the next fragment leaves.
        outer_lr, outer_momentum: the outer optimizer's; 1 and 0 are plain averaging, DiLoCo's own are 0.7 and 0.9.
        merge: what becomes of steps taken in the meantime.
        form, algorithm, bucket_mb: as for all-reduce.
    """

    __pydantic_config__: ClassVar = STRICT
    kind: Literal["local"] = "local"
    every: Count | Literal["auto"] = "auto"
    fragments: Annotated[int, pydantic.Field(ge=1, le=1024)] | Literal["auto"] = "auto"
    overlap: Annotated[int, pydantic.Field(ge=0)] | Literal["auto"] = "auto"
    outer_lr: Annotated[float, pydantic.Field(gt=0)] = 1.0
    outer_momentum: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.0
    merge: Literal["carry", "mix"] = "carry"
    form: Form = "auto"
    algorithm: Algorithm = "library"
    bucket_mb: Annotated[float, pydantic.Field(gt=0, le=1024)] = 4.0


@dataclass(frozen=True)
class Rhythm:
    """When each fragment leaves and is merged; steps are counted from 1."""

    every: int
    fragments: int
    overlap: int

    def leaving(self, step: int) -> list[int]:
        """The fragments whose differences leave after `step`."""
        return [f for f in range(self.fragments) if step > 0 and (step - self._offset(f)) % self.every == 0]

    def merging(self, step: int) -> list[int]:
        """The fragments that are merged after `step`."""
        return self.leaving(step - self.overlap)

    def _offset(self, fragment: int) -> int:
        return (fragment + 1) * self.every // self.fragments


def num_fragments(config: LocalConfig) -> int:
    """How many parts the model is cut into."""
    if config.fragments != "auto":
        return config.fragments
    return 1 if config.every != "auto" and config.every < _AUTO_FRAGMENTS else _AUTO_FRAGMENTS


def rhythm(config: LocalConfig, every: int, fragments: int) -> Rhythm:
    """The rhythm for a settled H and number of fragments."""
    between = every // fragments
    overlap = between if config.overlap == "auto" else config.overlap
    return Rhythm(every, fragments, overlap if every > 1 else 0)


def least_every(exchange_s: float, step_s: float, fragments: int, *, spare: float = 2.0, most: int = 512) -> int:
    """The least H at which exchanges that take `exchange_s` in all keep up with steps of `step_s`.

    `spare`: one timed exchange tells little of the slowest to come, nor of ranks that are not ready at once.
    """
    needed = -(-spare * exchange_s // max(step_s, 1e-9))
    return int(min(max(needed, fragments), max(most, fragments)))


class LocalSync(Summation):
    """The exchange of one bucket of differences from the anchor."""

    def __init__(self, config: LocalConfig, coder: Coder | None, topology: Topology) -> None:
        super().__init__(topology, coder, config.form, config.algorithm)
        self.config = config

    def num_lanes(self, device: str) -> int:
        """One for the agreement and one for fragments, so that neither waits for the other."""
        return 2


def outer_step(anchor: Tensor, difference: Tensor, momentum: Tensor | None, config: LocalConfig) -> None:
    """Move `anchor` by SGD with Nesterov momentum along -`difference` (the mean of anchor - local), all shape (n,).

    `momentum` is changed in place; None where the plan has none.
    """
    if momentum is not None:
        momentum.mul_(config.outer_momentum).add_(difference)
        anchor.sub_(momentum, alpha=config.outer_lr * config.outer_momentum)
    anchor.sub_(difference, alpha=config.outer_lr)
