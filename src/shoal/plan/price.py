"""What a run will send, from its plan and the shapes of its parameters: messages and bytes by link, seconds on links.

The counts are exact: a run's own (`traffic` of its last event) equal them, for a run from its beginning to its end
without an interruption. They are those of CPU ranks, where the ranks of a node share memory; what GPUs of one node send
each other through NCCL is not counted here. The seconds are an estimate: see `wire/pricing.py`. Exchanges are taken one
after the other and beside nothing else, so they are what all communication would take by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from shoal.cluster.description import Cluster
from shoal.plan.exchanges import Case, occasions
from shoal.plan.resolve import resolve_plan
from shoal.plan.schema import Plan
from shoal.strategy.topology import topologies
from shoal.wire.pricing import Links, rounds_of, seconds, traffic_of
from shoal.wire.traffic import Traffic

LATENCY_S = 100e-6
"""Of one message, where nothing better is known: a local network's round trip, halved, and a system call or two."""


@dataclass(frozen=True)
class Part:
    """One exchange of a run.

    Attributes:
        name: its bucket's.
        times: how often the run makes it.
        traffic: what each rank sends in it once.
        seconds: how long it takes once; None without links.
    """

    name: str
    times: int
    traffic: tuple[Traffic, ...]
    seconds: float | None


@dataclass(frozen=True)
class Price:
    """What a run of `steps` steps sends. `nodes[r]` is the name of rank r's node."""

    nodes: tuple[str, ...]
    steps: int
    parts: tuple[Part, ...]

    @property
    def traffic(self) -> list[Traffic]:
        """What each rank sends in the whole run."""
        whole = [Traffic() for _ in self.nodes]
        for part in self.parts:
            for rank, once in enumerate(part.traffic):
                whole[rank].merge(once, part.times)
        return whole

    @property
    def seconds(self) -> float | None:
        """Of communication in the whole run; None without links."""
        each = [None if part.seconds is None else part.times * part.seconds for part in self.parts]
        return None if None in each else sum(took for took in each if took is not None)


def price(
    plan: Plan,
    parameters: Sequence[tuple[str, Tensor]],
    nodes: Sequence[str],
    *,
    steps: int,
    links: Links | None = None,
    every: int | None = None,
    validates: bool = False,
) -> Price:
    """Walk every exchange of a run without performing it.

    Args:
        parameters: see `shapes_of`.
        nodes: the name of each rank's node.
        steps: of the run.
        links: for the seconds.
        every: what `sync.every = "auto"` comes to.
        validates: the job has validation data.

    Raises:
        PlanError: the plan does not fit so many ranks, or has no price.
    """
    views = topologies(nodes)
    resolved = resolve_plan(plan, len(nodes))
    case = Case(plan=resolved, views=views, parameters=parameters, steps=steps, every=every, validates=validates)
    parts = []
    for occasion in occasions(case):
        rounds = rounds_of(occasion.exchanges, lambda rank, group: views[rank].members(group))
        took = None if links is None else seconds(rounds, links)
        parts.append(Part(occasion.name, occasion.times, tuple(traffic_of(rounds, len(nodes))), took))
    return Price(tuple(nodes), steps, tuple(parts))


def shapes_of(model: nn.Module) -> list[tuple[str, Tensor]]:
    """A model's trainable parameters, each tensor once, with their shapes and dtypes but without values."""
    return [(name, p.detach().to("meta")) for name, p in model.named_parameters() if p.requires_grad]


def seats_of(cluster: Cluster) -> list[str]:
    """The name of each rank's node."""
    return [node.name for node in cluster.nodes for _ in range(node.ranks)]


def links_of(cluster: Cluster, *, latency_s: float = LATENCY_S) -> Links:
    """A cluster's links; a node whose link is not shaped has no limit."""
    rates = {node.name: node.rate_bits_per_s / 8 for node in cluster.nodes if node.rate_bits_per_s is not None}
    return Links(seats_of(cluster), rates, latency_s)
