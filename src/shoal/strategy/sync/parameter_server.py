"""Parameter servers hold the model's values and the optimizer; workers push gradients and pull values.

The three modes differ in nothing but how stale a worker may read (`staleness.py`): *bsp* waits for everybody's update
of each step, *ssp* lets a worker be `staleness` steps ahead of the slowest (Ho et al. 2013), *async* waits for nobody
(Dean et al. 2012). Parameters are cut and spread over the servers by `sharding.py`; each piece has a replica on another
server where there are two or more, so that an acknowledged update survives the loss of any one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import pydantic

from shoal.strategy.codec.feedback import Coder
from shoal.strategy.sync.summation import Summation
from shoal.strategy.topology import Topology
from shoal.strict_toml import STRICT


@dataclass(frozen=True, kw_only=True)
class ParameterServerConfig:
    """`[sync] kind = "parameter_server"`.

    Attributes:
        mode: how stale a worker may read: "bsp" not at all, "ssp" by `staleness` steps, "async" without a bound.
        staleness: ssp's bound s.
        servers: how many, each a process of its own beside the workers, on the first nodes in turn.
        replicate: keep each piece on a second server; default: where there are two or more.
        secrets: a file of keys (`shoal secrets FILE` makes one); with it everything is encrypted and both sides prove
            themselves.
    """

    __pydantic_config__: ClassVar = STRICT
    kind: Literal["parameter_server"] = "parameter_server"
    mode: Literal["bsp", "ssp", "async"] = "bsp"
    staleness: Annotated[int, pydantic.Field(ge=0)] = 3
    servers: Annotated[int, pydantic.Field(ge=1, le=1024)] = 1
    replicate: bool | None = None
    secrets: str | None = None


def replicated(config: ParameterServerConfig) -> bool:
    """Whether each piece has a replica."""
    return config.servers > 1 if config.replicate is None else config.replicate


class ParameterServerSync(Summation):
    """What workers of a parameter server agree on among themselves: losses and stops, summed over all."""

    def __init__(self, config: ParameterServerConfig, coder: Coder | None, topology: Topology) -> None:
        super().__init__(topology, None, "flat", "library")
        self.config = config
        self.coder = coder

    def num_lanes(self, device: str) -> int:
        """One, for the agreement; values travel to and from the servers."""
        return 1
