"""`[layout]`: the sizes of the axes, and how each of them works."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from shoal.strict_toml import STRICT

Size = Annotated[int, Field(ge=1)]
Schedule = Literal["gpipe", "1f1b", "interleaved", "zero_bubble"]


@dataclass(frozen=True, kw_only=True)
class LayoutConfig:
    """`[layout]`: how replicas of the model lie over ranks; the product of the four axes is the number of ranks.

    Attributes:
        replicate: the number of replicas, each kept in agreement with the others by `[sync]`; default: what is left.
        shard: ranks that divide one replica's parameters, gradients and optimizer state, and its samples (FSDP2,
            Zhao et al. 2023).
        tensor: ranks that divide the matrices themselves, and so the computing on the same samples (Shoeybi et al.
            2019).
        pipeline: ranks that divide the layers, and pass micro-batches on.
        schedule: the order of forward and backward in a pipeline: "gpipe" (Huang et al. 2019), "1f1b" (Narayanan et al.
            2019), "interleaved" (Narayanan et al. 2021), "zero_bubble" (Qi et al. 2023).
        stages: parts of the model on each rank of a pipeline; "interleaved" and "zero_bubble" need 2 or more.
        micro_batches: pieces into which a pipeline cuts a rank's samples; default: twice the number of stages.
        recompute: forget activations inside each block, and compute them again in backward.
        keep_gathered: keep what forward gathered for backward: one gathering less, for the memory of whole parameters
            while a step computes.
        defer_above: a divided model's parameters with more numbers than this are never made whole but one at a time.
        offload: keep sharded parameters and the optimizer's state in the CPU's memory, for ranks that compute on a GPU.
    """

    __pydantic_config__: ClassVar = STRICT
    replicate: Size | None = None
    shard: Size = 1
    tensor: Size = 1
    pipeline: Size = 1
    schedule: Schedule = "1f1b"
    stages: Size = 1
    micro_batches: Size | None = None
    recompute: bool = False
    keep_gathered: bool = False
    offload: bool = False
    defer_above: Annotated[int, Field(ge=0)] = 1_000_000

    @property
    def ranks_per_replica(self) -> int:
        """Ranks that hold one replica together."""
        return self.shard * self.tensor * self.pipeline
