"""Gossip: no centre at all; every rank mixes its parameters with its neighbours' while it computes.

*D-PSGD* (Lian et al. 2017): x_i <- sum_j w_ij x_j - rate * g_i(x_i), where mixing runs beside the gradient's
computation. With a codec it is *CHOCO-SGD* (Koloskova et al. 2019): neighbours keep a copy of what was told of each
other and send only encoded differences to it, which is an error feedback of its own; so any codec fits, and gamma says
how far a rank moves towards its neighbours. *AD-PSGD* (Lian et al. 2018), the asynchronous mode, averages with one
random neighbour at a time and waits for nobody: see engine/exchange/pairs.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import pydantic
import torch
from torch import Tensor

from shoal.ops import WORLD, Exchange, SendRecv
from shoal.strategy.bucket import Bucket
from shoal.strategy.codec.feedback import Coder
from shoal.strategy.sync import graph
from shoal.strategy.sync.graph import Graph
from shoal.strategy.sync.summation import Summation
from shoal.strategy.topology import Topology
from shoal.strict_toml import STRICT


@dataclass(frozen=True, kw_only=True)
class GossipConfig:
    """`[sync] kind = "gossip"`.

    Attributes:
        mode: "synchronous" mixes once a step; "asynchronous" averages with a random neighbour whenever it is ready.
        topology: who talks to whom; "matching" draws random pairs for every step, "edges" takes `edges`.
        edges: pairs of ranks, for topology "edges".
        gamma: with a codec, how far to move towards the neighbours; default 0.5. Without one it is 1.
        bucket_mb: how much of the model is exchanged at once.
    """

    __pydantic_config__: ClassVar = STRICT
    kind: Literal["gossip"] = "gossip"
    mode: Literal["synchronous", "asynchronous"] = "synchronous"
    topology: Literal["ring", "torus", "exponential", "matching", "edges"] = "ring"
    edges: tuple[tuple[Annotated[int, pydantic.Field(ge=0)], Annotated[int, pydantic.Field(ge=0)]], ...] = ()
    gamma: Annotated[float, pydantic.Field(gt=0, le=1)] = 0.5
    bucket_mb: Annotated[float, pydantic.Field(gt=0, le=1024)] = 4.0


def graph_of(config: GossipConfig, size: int, *, seed: int = 0, step: int = 0) -> Graph:
    """Who talks to whom in one step.

    Raises:
        PlanError: the plan's own edges do not connect all ranks.
    """
    match config.topology:
        case "ring":
            return graph.ring(size)
        case "torus":
            return graph.torus(size)
        case "exponential":
            return graph.exponential(size)
        case "matching":
            return graph.matching(size, seed=seed, step=step)
        case "edges":
            return graph.declared(size, config.edges)


class GossipSync(Summation):
    """The mixing of one bucket of parameters. The sums of its base serve agreements and the mean of all replicas."""

    def __init__(self, config: GossipConfig, coder: Coder | None, topology: Topology) -> None:
        super().__init__(topology, None, "flat", "library")
        self.config = config
        self.coder = coder
        self._graph = graph_of(config, topology.world_size)
        self._told: dict[str, dict[str, Tensor]] = {}

    def num_lanes(self, device: str) -> int:
        """One for the agreement and one for mixing."""
        return 2

    def mix(self, bucket: Bucket, step: int) -> Exchange:
        """Turn this rank's values, `bucket.source`, into their mixture with the neighbours', `bucket.target`."""
        graph_ = self._graph
        if self.config.topology == "matching":
            graph_ = graph_of(self.config, self._topology.world_size, step=step)
        if self.coder is None:
            yield from self._mix_exact(bucket, graph_)
        else:
            yield from self._mix_encoded(bucket, graph_, self.coder)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """By bucket, what neighbours have been told and have told; the tensors are this object's own."""
        return self._told

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Go on from `state_dict`'s value."""
        self._told = state

    def _mix_exact(self, bucket: Bucket, graph_: Graph) -> Exchange:
        rank, own = self._topology.rank, 1.0
        arriving, total = torch.empty_like(bucket.source), torch.zeros_like(bucket.source)
        for peer in _peers(graph_, rank):
            yield SendRecv(bucket.source, peer, arriving, peer, WORLD)
            weight = graph_.weight(rank, peer)
            total.add_(arriving, alpha=weight)
            own -= weight
        bucket.target.copy_(total.add_(bucket.source, alpha=own))

    def _mix_encoded(self, bucket: Bucket, graph_: Graph, coder: Coder) -> Exchange:
        rank, values = self._topology.rank, bucket.source
        told = self._told.setdefault(
            bucket.name, {"own": torch.zeros_like(values), "neighbours": torch.zeros_like(values)}
        )
        difference = (values - told["own"]).view(1, -1)
        compress = coder.begin(bucket.name)
        payload = coder.encode(bucket.name, difference) if compress else difference
        told["own"].add_(coder.decode(payload, len(values), values)[0] if compress else difference[0])
        weights = 0.0
        for peer in _peers(graph_, rank):
            arriving = torch.empty_like(payload)
            yield SendRecv(payload, peer, arriving, peer, WORLD)
            news = coder.decode(arriving, len(values), values)[0] if compress else arriving[0]
            weight = graph_.weight(rank, peer)
            told["neighbours"].add_(news, alpha=weight)
            weights += weight
        towards = told["neighbours"] - weights * told["own"]
        bucket.target.copy_(values + (self.config.gamma if compress else 1.0) * towards)


def _peers(graph_: Graph, rank: int) -> list[int]:
    """This rank's partner in each round that it takes part in."""
    return [b if a == rank else a for pairs in graph_.rounds() for a, b in pairs if rank in (a, b)]
