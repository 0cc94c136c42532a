"""Synchronous all-reduce: every rank gets the exact sum of all ranks' gradients before it takes a step.

Averaging is not done here: each rank scales its loss by its share of the global batch, so that a sum is the mean. How
a bucket is summed, and where a codec acts, is `summation.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import pydantic

from shoal.strategy.codec.feedback import Coder
from shoal.strategy.sync.algorithms import Algorithm
from shoal.strategy.sync.summation import Form, Summation
from shoal.strategy.topology import Topology
from shoal.strict_toml import STRICT


@dataclass(frozen=True, kw_only=True)
class AllReduceConfig:
    """`[sync] kind = "allreduce"`.

    Attributes:
        form: "hierarchical" reduces inside each node first; "flat" sends every rank over the network; "auto" is
            hierarchical wherever a node holds more than one rank.
        algorithm: how an uncompressed bucket is summed over the network: see `algorithms.py`.
        bucket_mb: the size, in MB of gradient, at which a bucket is closed and sent.
        verify: send a CRC-32 with every message, and use none that is damaged. The library's own sums cannot: algorithm
            "library" then means "ring".
        backup: a step commits without the slowest so many ranks; 0 waits for all.
        backup_grace: for how much longer it waits for them once the others are ready, as a part of a step's time.
        lanes: how many buckets are on the network at once, each over connections of its own; 0 decides by itself.
    """

    __pydantic_config__: ClassVar = STRICT
    kind: Literal["allreduce"] = "allreduce"
    form: Form = "auto"
    algorithm: Algorithm = "library"
    bucket_mb: Annotated[float, pydantic.Field(gt=0, le=1024)] = 4.0
    verify: bool = False
    backup: Annotated[int, pydantic.Field(ge=0)] = 0
    backup_grace: Annotated[float, pydantic.Field(ge=0, le=10)] = 0.1
    lanes: Annotated[int, pydantic.Field(ge=0, le=16)] = 0


class AllReduceSync(Summation):
    """The exchange of one bucket of gradients, each step."""

    def __init__(self, config: AllReduceConfig, coder: Coder | None, topology: Topology) -> None:
        by_itself = config.verify and config.algorithm == "library"
        super().__init__(topology, coder, config.form, "ring" if by_itself else config.algorithm)
        self.config = config

    def num_lanes(self, device: str) -> int:
        """How many exchanges run at once.

        In shared memory one keeps all cores busy; NCCL may deadlock when two communicators run at once.
        """
        if self.config.backup:
            return 1
        return self.config.lanes or (1 if device == "cuda" or not self.crosses_network else 2)
