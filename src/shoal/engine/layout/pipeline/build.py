"""From a whole model to this rank's stages."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shoal.engine.layout.pipeline.line import Line, Stage
from shoal.engine.layout.pipeline.profile import Profile, measure
from shoal.engine.layout.pipeline.trace import Call, StageGraph, Traced, cut_graph, trace
from shoal.engine.layout.place import Place
from shoal.engine.layout.replica import Held
from shoal.errors import JobError
from shoal.strategy.layout.cut import Weight, cut
from shoal.wire.groups import failures_as_lost_peers

Tied = Mapping[str, list[int]]
"""Parameters that several ranks of a pipeline hold, and which: their places in the pipeline."""


def build_line(
    model: nn.Module, place: Place, names: Mapping[int, str], call: Call, *, bf16: bool
) -> tuple[Line, Traced, nn.Module, Tied]:
    """Trace, measure and cut a model, equal on every rank. Collective.

    Args:
        names: of the parameters, by identity.
        call: what one micro-batch calls the model with.

    Returns:
        The pipeline, the traced model for its arguments' names, the module of this rank's stages, and the parameters
        that several ranks hold.

    Raises:
        JobError: the model cannot be cut into so many stages.
    """
    config = place.config
    traced = trace(model, call)
    profile = measure(traced, traced.inputs(call), micro_batches=config.micro_batches or 1)
    units = _units(traced, profile)
    weights = _agreed([_together(profile, unit) for unit in units])
    num_stages = config.pipeline * config.stages
    if len(units) < num_stages:
        raise JobError(
            f"the model has {len(units)} layers that a pipeline can be cut between, fewer than the {num_stages} stages "
            f"of layout.pipeline = {config.pipeline} with layout.stages = {config.stages}; set them lower"
        )
    layers = [[name for unit in units[part.start : part.stop] for name in unit] for part in cut(weights, num_stages)]
    graphs = cut_graph(traced, layers, profile.plain)
    holders = [{names[id(p)] for p in graph.parameters()} for graph in graphs]
    tied: dict[str, list[int]] = {}
    for name in dict.fromkeys(names.values()):
        ranks = sorted({number % config.pipeline for number, held in enumerate(holders) if name in held})
        if len(ranks) > 1:
            tied[name] = ranks
    own = {number: Stage(graphs[number]) for number in range(place.index("pipeline"), num_stages, config.pipeline)}
    group = place.mesh["pipeline"].get_group()
    line = Line([_skeleton(graph) for graph in graphs], own, config, place.device, group, autocast=bf16)
    line.layers = layers
    return line, traced, nn.ModuleDict({str(number): stage for number, stage in own.items()}), tied


def sum_tied(place: Place, parameters: Sequence[Held], tied: Tied) -> Callable[[], None]:
    """Make what sums the gradients of parameters that several stages use. Collective."""
    groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
    for ranks in sorted({tuple(ranks) for ranks in tied.values()}):
        for line in place.grid.groups("pipeline"):  # every rank has to make every group
            members = [line[index] for index in ranks]
            group = dist.new_group(members)
            if place.rank in members:
                groups[ranks] = group
    shared = [(held, groups[tuple(tied[held.name])]) for held in parameters if held.name in tied]

    def after_backward() -> None:
        with failures_as_lost_peers("summing the gradients of parameters that several stages use"):
            for held, group in shared:
                gradient = held.owner.grad
                values = torch.zeros_like(held.local) if gradient is None else held.local_of(gradient)
                dist.all_reduce(values, group=group)

    return after_backward


def _units(traced: Traced, profile: Profile) -> list[list[str]]:
    """Layers that stay together: a module with parameters, and what follows it up to the next."""
    modules = dict(traced.module.named_modules())
    targets = {node.name: str(node.target) for node in traced.module.graph.nodes if node.op == "call_module"}
    units: list[list[str]] = [[]]
    has_weight = False
    for name in traced.layers:
        weighty = name in targets and any(True for _ in modules[targets[name]].parameters())
        if weighty and has_weight:
            units.append([])
        has_weight = has_weight or weighty
        units[-1].append(name)
    return units


def _together(profile: Profile, unit: Sequence[str]) -> Weight:
    weights = [profile.weights[name] for name in unit]
    return Weight(sum(w.seconds for w in weights), sum(w.size_bytes for w in weights))


def _agreed(weights: Sequence[Weight]) -> list[Weight]:
    """Rank 0's measurements, for all."""
    values = torch.tensor([[w.seconds, w.size_bytes] for w in weights], dtype=torch.float64)
    with failures_as_lost_peers("agreeing where to cut the model"):
        dist.broadcast(values, src=0)
    return [Weight(seconds, size_bytes) for seconds, size_bytes in values.tolist()]


def _skeleton(graph: StageGraph) -> StageGraph:
    """A stage without values."""
    memo: dict[int, Tensor] = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in graph.parameters()}
    memo |= {id(buffer): buffer.to("meta") for buffer in graph.buffers()}
    return copy.deepcopy(graph, memo)
