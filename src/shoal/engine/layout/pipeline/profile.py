"""What each layer of a traced model takes: seconds and bytes, measured on a batch of the job's own."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from shoal.engine.layout.pipeline.trace import Traced
from shoal.strategy.layout.cut import Weight

_REPEATS = 3
_STATES_PER_PARAMETER = 4
"""A value, its gradient, and two of Adam's."""


@dataclass
class Profile:
    """Of each layer what it takes; and the layers whose values are no tensors."""

    weights: dict[str, Weight] = field(default_factory=dict)
    plain: set[str] = field(default_factory=set)


def measure(traced: Traced, inputs: Mapping[str, Any], *, micro_batches: int) -> Profile:
    """Run a traced model layer by layer, forward and backward.

    Args:
        inputs: one micro-batch, by the names of the graph's inputs.
        micro_batches: so many are in flight at most, and keep their activations.
    """
    profile = Profile()
    # The first run warms up memory and threads, and does not count.
    for _ in range(2):
        _Stopwatch(traced.module, profile, micro_batches).run(*(inputs[name] for name in traced.arguments))
    return profile


class _Stopwatch(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, profile: Profile, micro_batches: int) -> None:
        super().__init__(module)
        self._profile = profile
        self._micro_batches = micro_batches

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A parameter that the model itself uses."""
        value = super().get_attr(target, args, kwargs)
        return _stand_in(value) if isinstance(value, Tensor) and value.is_meta else value

    def run_node(self, node: fx.Node) -> Any:
        if not node.op.startswith("call_"):
            return super().run_node(node)
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        leaves = [_leaf(value) for value in args]
        fastest, value, kept = float("inf"), None, 0
        for _ in range(_REPEATS):
            saved = _Saved()
            started = time.perf_counter()
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
                value = self._call(node, tuple(leaves), kwargs)
            _backward(value)
            fastest, kept = min(fastest, time.perf_counter() - started), saved.size_bytes
        if not isinstance(value, Tensor):
            self._profile.plain.add(node.name)
        module = self.fetch_attr(str(node.target)) if node.op == "call_module" else None
        size_bytes = _parameter_bytes(module) * _STATES_PER_PARAMETER + kept * self._micro_batches
        self._profile.weights[node.name] = Weight(fastest, size_bytes)
        return value.detach() if isinstance(value, Tensor) else value

    def _call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node.op == "call_module":
            module = self.fetch_attr(str(node.target))
            stand_ins = _stand_ins(module)
            if stand_ins:
                return torch.func.functional_call(module, stand_ins, args, kwargs)
        return getattr(self, node.op)(node.target, args, kwargs)


def _stand_ins(module: nn.Module) -> dict[str, Tensor]:
    """Values for what has none yet: any do, for their time."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name: _stand_in(tensor) for name, tensor in tensors if tensor.is_meta}


def _stand_in(tensor: Tensor) -> Tensor:
    return torch.full(tensor.shape, 0.01, dtype=tensor.dtype).requires_grad_(tensor.requires_grad)


class _Saved:
    """Counts what autograd keeps for backward."""

    def __init__(self) -> None:
        self.size_bytes = 0

    def pack(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            self.size_bytes += tensor.numel() * tensor.element_size()
        return tensor


def _leaf(value: Any) -> Any:
    """As if it came from the layer before: a gradient is wanted for it."""
    return value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value


def _backward(value: Any) -> None:
    outputs = [v for v in (value if isinstance(value, tuple | list) else [value]) if isinstance(v, Tensor)]
    outputs = [output for output in outputs if output.requires_grad]
    if outputs:
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])


def _parameter_bytes(module: nn.Module | None) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters()) if module is not None else 0
