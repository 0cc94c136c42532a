"""A model's forward as a graph of its layers, and the graph cut into stages.

Blocks (see blocks.py) and PyTorch's own modules stay whole; what the model does around them is traced by torch.fx.
"""

from __future__ import annotations

import contextlib
import inspect
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn

from shoal.engine.layout.blocks import blocks
from shoal.errors import JobError

Call = tuple[tuple[Any, ...], Mapping[str, Any]]
"""The arguments of one call of the model."""

_FACTORIES = ("arange", "zeros", "ones", "full", "empty")


class _Stop(Exception):  # noqa: N818
    """Carries a model's arguments out of the job's loss."""

    def __init__(self, call: Call) -> None:
        self.call = call


class Recorder(nn.Module):
    """Stands in for the model while a job's loss is asked what it calls the model with."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Never returns."""
        raise _Stop((args, kwargs))


class Playback(nn.Module):
    """Stands in for the model where its outputs are known already."""

    def __init__(self, outputs: Any) -> None:
        super().__init__()
        self._outputs = [outputs]

    def forward(self, *_: Any, **__: Any) -> Any:
        """The outputs, once.

        Raises:
            JobError: the loss calls the model more than once.
        """
        if not self._outputs:
            raise JobError(
                "the job's loss calls the model twice for one batch, which a pipeline cannot do; call it once, or use "
                "another axis than layout.pipeline"
            )
        return self._outputs.pop()


def call_of(loss: Any, samples: Any) -> Call:
    """What a job's loss calls the model with for these samples.

    Raises:
        JobError: it does not call the model.
    """
    try:
        loss(Recorder(), samples)
    except _Stop as stop:
        return stop.call
    raise JobError("the job's loss does not call the model, so there is nothing to cut into a pipeline's stages")


@dataclass(frozen=True)
class Traced:
    """A model as a graph.

    Attributes:
        module: the model, run node by node.
        layers: the names of nodes that compute something, in order; the graph may be cut before each but the first.
        arguments: the names of the inputs that one call gives.
        signature: the model's own, of `forward`.
    """

    module: fx.GraphModule
    layers: list[str]
    arguments: list[str]
    signature: inspect.Signature

    def inputs(self, call: Call) -> dict[str, Any]:
        """One call's arguments by the names of the graph's inputs."""
        return dict(zip(self.arguments, _bound(self.signature, call).values(), strict=True))


def trace(model: nn.Module, call: Call) -> Traced:
    """Trace a model's forward for calls like this one.

    Raises:
        JobError: it does what a graph cannot hold; the message says where.
    """
    signature = inspect.signature(model.forward)
    given = _bound(signature, call)
    left_out = {
        name: parameter.default
        for name, parameter in signature.parameters.items()
        if name not in given and parameter.default is not parameter.empty
    }
    tracer = _LayerTracer(blocks(model))
    try:
        with _factories_traced(tracer):
            graph = tracer.trace(model, concrete_args=left_out)
    except Exception as error:
        raise JobError(_refusal(model, error)) from None
    module = fx.GraphModule(model, graph)
    module.graph.eliminate_dead_code()
    arguments = [node.name for node in module.graph.nodes if node.op == "placeholder" and node.target in given]
    layers = [node.name for node in module.graph.nodes if node.op.startswith("call_")]
    return Traced(module, layers, arguments, signature)


class StageGraph(nn.Module):
    """The layers of one stage.

    Attributes:
        takes: names of the values that come from the stage before; `gives`: of those that go to the next.
        needs: names of the model's own inputs that this stage uses.
    """

    def __init__(self, module: fx.GraphModule, takes: list[str], needs: list[str], gives: list[str]) -> None:
        super().__init__()
        self.body = module
        self.takes, self.needs, self.gives = takes, needs, gives

    def forward(self, taken: Sequence[Any], inputs: Mapping[str, Any]) -> Any:
        """The values that go on; of the last stage, the model's outputs."""
        return self.body(*taken, *(inputs[name] for name in self.needs))


def cut_graph(traced: Traced, stages: Sequence[Sequence[str]], plain: Collection[str] = ()) -> list[StageGraph]:
    """Cut a traced model into one module for each list of layers; they share the model's modules.

    Args:
        plain: layers whose values are no tensors (sizes, devices): computed again by every stage that uses them.
    """
    graph = traced.module.graph
    nodes = {node.name: node for node in graph.nodes}
    output = next(node for node in graph.nodes if node.op == "output")
    order = {node: place for place, node in enumerate(graph.nodes)}
    wanted: set[fx.Node] = set()  # by the stages behind
    built: list[StageGraph] = []
    for index in reversed(range(len(stages))):
        is_last = index == len(stages) - 1
        roots = [nodes[name] for name in stages[index]] + ([output] if is_last else [])
        inside = _with_plain(roots, set(plain))
        gives = sorted(wanted, key=order.__getitem__)
        used = {argument for node in inside for argument in node.all_input_nodes} | wanted
        wanted = {node for node in used - inside if node.op.startswith("call_")}
        takes = sorted(wanted, key=order.__getitem__)
        built.append(_stage(traced, [n for n in graph.nodes if n in inside | used], inside, takes, gives, is_last))
    return built[::-1]


def _with_plain(roots: Sequence[fx.Node], plain: Collection[str]) -> set[fx.Node]:
    """These nodes, and all whose values are no tensors that they are computed from."""
    inside, front = set(roots), list(roots)
    while front:
        for node in front.pop().all_input_nodes:
            if node.name in plain and node not in inside:
                inside.add(node)
                front.append(node)
    return inside


def _stage(
    traced: Traced,
    nodes: Sequence[fx.Node],
    inside: Collection[fx.Node],
    takes: Sequence[fx.Node],
    gives: Sequence[fx.Node],
    is_last: bool,
) -> StageGraph:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {node: graph.placeholder(node.name) for node in takes}
    inputs = [node for node in nodes if node.op == "placeholder"]
    copies |= {node: graph.placeholder(node.name) for node in inputs}
    for node in nodes:
        if node.op == "get_attr" or (node in inside and node.op != "output"):
            copies[node] = graph.node_copy(node, copies.__getitem__)
    if is_last:
        [end] = [node for node in nodes if node.op == "output"]
        graph.output(fx.node.map_arg(end.args[0], copies.__getitem__))
    else:
        graph.output(tuple(copies[node] for node in gives))
    names = [[node.name for node in group] for group in (takes, inputs, gives)]
    return StageGraph(fx.GraphModule(traced.module, graph), *names)


class _LayerTracer(fx.Tracer):
    """Leaves blocks and modules without blocks inside whole."""

    def __init__(self, whole: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._whole = {id(module) for module in whole.values()}

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        """Whether a module is one node."""
        if id(module) in self._whole:
            return True
        return not any(id(child) in self._whole for child in module.modules())


@contextlib.contextmanager
def _factories_traced(tracer: fx.Tracer) -> Iterator[None]:
    """Let functions that make tensors take traced sizes and devices."""

    def traced(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if any(isinstance(value, fx.Proxy) for value in [*args, *kwargs.values()]):
                return tracer.create_proxy("call_function", function, args, kwargs)
            return function(*args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        for name in _FACTORIES:
            stack.enter_context(mock.patch.object(torch, name, traced(getattr(torch, name))))
        yield


def _bound(signature: inspect.Signature, call: Call) -> dict[str, Any]:
    return dict(signature.bind(*call[0], **call[1]).arguments)


def _refusal(model: nn.Module, error: Exception) -> str:
    """Where in the user's code tracing ended, and why."""
    here = inspect.getsourcefile(type(model)) or ""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == here]
    where = f" at {frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else ""
    reason = str(error).partition("\n")[0]
    return (
        f"the model {type(model).__name__} cannot be cut into a pipeline's stages: its forward does what no graph can "
        f"hold{where}: {reason}. Move it into one of the model's blocks, which stay whole, or into the loss; or use "
        "another axis than layout.pipeline"
    )


def tensors_of(values: Sequence[Any], names: Sequence[str]) -> tuple[Tensor, ...]:
    """Check that what goes from stage to stage can go there.

    Raises:
        JobError: something is no tensor.
    """
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, Tensor):
            raise JobError(
                f"the value {name} of the model's forward would have to go from one stage of the pipeline to the next, "
                f"but it is a {type(value).__name__}; only tensors can: compute it inside the block that uses it"
            )
    return tuple(values)
