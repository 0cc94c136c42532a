"""What one rank holds of a replica, as everything behind autograd sees it: plain tensors with names.

A layout may turn the model's parameters into DTensors. Exchanges, the optimizer, clipping and checkpoints work on
`Held.local` instead: a plain parameter over the same memory. Where nothing is divided it is the parameter itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from shoal.engine.layout.usage import Usage
from shoal.strategy.layout.region import Region
from shoal.wire.groups import failures_as_lost_peers

NamedParameter = tuple[str, nn.Parameter]


@dataclass(frozen=True)
class Held:
    """One trainable parameter.

    Attributes:
        name: in the whole model, the same under every layout.
        owner: what autograd gives a gradient to.
        local: this rank's values, plain; the optimizer's parameter.
        region: where they lie in the whole parameter.
        copies: how many ranks of one replica hold just these values.
    """

    name: str
    owner: nn.Parameter
    local: nn.Parameter
    region: Region
    copies: int = 1

    @classmethod
    def whole(cls, name: str, parameter: nn.Parameter) -> Held:
        """A parameter that is not divided."""
        return cls(name, parameter, parameter, Region.whole(parameter.shape))

    def local_of(self, gradient: Tensor) -> Tensor:
        """This rank's part of a gradient that autograd gave."""
        return gradient._local_tensor if isinstance(gradient, DTensor) else gradient

    def like_owner(self, local: Tensor) -> Tensor:
        """Plain values as `owner.grad` has to look."""
        owner = self.owner
        if not isinstance(owner, DTensor):
            return local
        dressed: Tensor = DTensor.from_local(
            local, owner.device_mesh, owner.placements, run_check=False, shape=owner.shape, stride=owner.stride()
        )
        return dressed


@dataclass
class Replica:
    """A rank's part of one replica.

    Attributes:
        model: what this rank computes: the whole model, or its stage.
        parameters: in the whole model's order, each tensor once.
        buffers: the persistent ones that this rank has, by their names in the whole model.
        total: adds a tensor up in place over the ranks that hold this replica together; None: this rank alone.
        peers: the process group of all ranks, of any replica, that compute the same layers; None: all ranks.
        speaks: this rank's loss counts (of ranks that compute the same samples, one).
        order: the place of every parameter of the whole model, on whatever rank.
        usage: tells gradients from zeros where the layout gives every parameter one.
        tied: second names of the whole model's parameters, and the first.
        size: numbers in the whole model's parameters, where this rank does not hold all.
        held: those parameters that are trained.
        after_backward: completes gradients that several ranks of the replica contribute to.
    """

    model: nn.Module
    parameters: Sequence[Held]
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    total: Callable[[Tensor], object] | None = None
    peers: dist.ProcessGroup | None = None
    speaks: bool = True
    after_backward: Callable[[], None] | None = None
    order: Mapping[str, int] = field(default_factory=dict)
    usage: Usage | None = None
    tied: Mapping[str, str] = field(default_factory=dict)
    size: int = 0
    held: Sequence[Held] = field(init=False)

    @classmethod
    def whole(cls, model: nn.Module) -> Replica:
        """One rank holds all of it."""
        return cls(model, [Held.whole(name, p) for name, p in model.named_parameters()], persistent_buffers(model))

    def __post_init__(self) -> None:
        self.held = [held for held in self.parameters if held.owner.requires_grad]
        self._sharded = [module for module in self.model.modules() if isinstance(module, FSDPModule)]

    @property
    def is_whole(self) -> bool:
        """Whether this rank alone holds the replica."""
        return self.total is None

    @property
    def num_values(self) -> int:
        """Parameters of the whole model, in numbers."""
        return self.size or sum(held.owner.numel() for held in self.parameters)

    @property
    def named_locals(self) -> list[NamedParameter]:
        """The optimizer's parameters by name."""
        return [(held.name, held.local) for held in self.held]

    def clear_gradients(self) -> None:
        """A new step: no gradient is there yet."""
        for held in self.held:
            held.owner.grad = held.local.grad = None
        if self.usage is not None:
            self.usage.clear()

    def used(self, name: str) -> bool:
        """Whether this rank's samples of this step used a parameter that has a gradient."""
        return self.usage is None or self.usage.used(name)

    def used_anywhere(self, own: Sequence[bool]) -> list[bool]:
        """For each of `held`, whether any rank of the replica used it. Collective."""
        if self.is_whole:
            return list(own)
        flags = [0.0] * len(self.order)
        for held, flag in zip(self.held, own, strict=True):
            flags[self.order[held.name]] = float(flag)
        total = self.sum(flags)
        return [total[self.order[held.name]] > 0 for held in self.held]

    def agree(self, loss: Tensor, votes: Sequence[bool]) -> tuple[Tensor, list[bool]]:
        """This rank's part of the loss, and what it asks for: summed over the replica. Collective."""
        if self.is_whole:
            return loss, list(votes)
        total, *sums = self.sum([float(loss) if self.speaks else 0.0, *map(float, votes)])
        return torch.tensor(total, dtype=torch.float64), [votes > 0 for votes in sums]

    def finish_backward(self) -> None:
        """All gradients of this rank are there: complete them, and hand them to the optimizer's parameters."""
        if self.after_backward is not None:
            self.after_backward()
        if self.is_whole:
            return
        own = [held.owner.grad is not None and self.used(held.name) for held in self.held]
        for held, used in zip(self.held, self.used_anywhere(own), strict=True):
            if held.owner is not held.local:
                gradient = held.owner.grad if used else None
                held.local.grad = None if gradient is None else held.local_of(gradient)

    def state_dict(self) -> dict[str, Any]:
        """The model's state by name, as the model has it where this rank holds all of it; else this rank's values."""
        if self.is_whole:
            state: dict[str, Any] = self.model.state_dict()
            return state
        return {held.name: held.local.detach() for held in self.parameters} | dict(self.buffers)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over a whole model's values by name."""
        if isinstance(state, dict) and self.is_whole:
            self.model.load_state_dict(state)
            return
        with torch.no_grad():
            for held in self.parameters:
                held.local.copy_(held.region.take(state[held.name]))
            for name, buffer in self.buffers.items():
                buffer.copy_(state[name])
        self.publish()

    def publish(self) -> None:
        """Let the model compute with what the optimizer's parameters hold now."""
        for module in self._sharded:
            module.reshard()  # after an evaluation the outermost parameters are still gathered, and old
        with torch.no_grad():
            for held in self.parameters:
                if held.owner is held.local:
                    continue
                memory = held.owner._local_tensor if isinstance(held.owner, DTensor) else held.owner.data
                if memory.data_ptr() != held.local.data_ptr():
                    memory.copy_(held.local)

    def sum(self, values: Iterable[float]) -> list[float]:
        """Add numbers up over the ranks of the replica, in float64. Collective."""
        total = torch.tensor(list(values), dtype=torch.float64)
        if self.total is not None:
            with failures_as_lost_peers("summing inside a replica"):
                self.total(total)
        summed: list[float] = total.tolist()
        return summed

    def square_norm(self, tensors: Iterable[tuple[Held, Tensor]]) -> float:
        """The squared 2-norm of values that lie as the parameters do, over the whole replica. Collective."""
        own = sum(
            float(torch.linalg.vector_norm(values, dtype=torch.float64).square()) / held.copies
            for held, values in tensors
            if values.numel()
        )
        [total] = self.sum([own])
        return total

    def clip(self, max_norm: float) -> float:
        """Scale this replica's gradient down to `max_norm`; return its norm before that. Collective."""
        if self.is_whole:
            return float(torch.nn.utils.clip_grad_norm_([held.local for held in self.held], max_norm))
        gradients = [(held, held.local.grad) for held in self.held if held.local.grad is not None]
        norm = math.sqrt(self.square_norm(gradients))
        factor = max_norm / (norm + 1e-6)
        if factor < 1:
            for _, gradient in gradients:
                gradient.mul_(factor)
        return norm


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to a model's state, by name."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }
