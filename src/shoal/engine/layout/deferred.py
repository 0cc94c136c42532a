"""Builds a model without its large parameters: records how each comes about, and makes it later, one at a time.

The model's constructor runs as it is. A large tensor that it makes has no memory; what is done to it is written down,
and numbers that it would have drawn are drawn and thrown away, so that every other parameter gets what it would get.
Later `Deferred.make` plays back what happened to one parameter: bit for bit what an ordinary build would hold.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from shoal.errors import JobError

_OVERWRITES = {
    "uniform_",
    "normal_",
    "zero_",
    "fill_",
    "bernoulli_",
    "random_",
    "exponential_",
    "_no_grad_trunc_normal_",
}


@dataclass(frozen=True)
class _Spot:
    """A recorded tensor: a window on the memory numbered `memory`."""

    memory: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    def on(self, base: Tensor) -> Tensor:
        return base.as_strided(self.shape, self.stride, self.offset)


@dataclass(frozen=True)
class _Act:
    """One call: its arguments with spots in place of recorded tensors, and the generator's state before."""

    function: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[_Spot, ...]
    dice: Tensor | None

    @property
    def name(self) -> str:
        """Of the function."""
        is_operator = isinstance(self.function, torch._ops.OpOverload)
        name: str = self.function._schema.name.rpartition("::")[2] if is_operator else self.function.__name__
        return name

    @property
    def is_view(self) -> bool:
        """Whether its outputs may be windows on what it was given."""
        return isinstance(self.function, torch._ops.OpOverload) and not self.function._schema.is_mutable

    @property
    def memories(self) -> set[int]:
        """All that it reads or writes."""
        return {spot.memory for spot in [*_inputs(self), *self.outputs]}


class Deferred(TorchDispatchMode):
    """While it is active, tensors of more than `least` numbers are recorded instead of made."""

    def __init__(self, least: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._least = least
        self._acts: list[_Act] = []
        self._numbers: dict[int, int] = {}  # storage -> memory
        self._kept: list[Any] = []  # storages, so that none is taken for another
        self._spots: dict[str, _Spot] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record what touches a recorded tensor or makes a large one; let everything else happen."""
        kwargs = dict(kwargs or {})
        flat, _ = tree_flatten((args, kwargs))
        if any(isinstance(value, Tensor) and self.knows(value) for value in flat):
            return self._record(func, args, kwargs)
        if self._is_large(func, args, kwargs):
            return self._record(func, args, kwargs)
        return func(*args, **kwargs)

    def adopt(self, model: nn.Module) -> None:
        """Remember which parameters and buffers of a model that was built under this mode have no values yet."""
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_meta:
                self._spots[name] = self._spot(tensor)

    @property
    def names(self) -> set[str]:
        """Of parameters and buffers without values."""
        return set(self._spots)

    def make(self, name: str) -> Tensor:
        """The whole values of one parameter."""
        spot = self._spots[name]
        wanted, acts = {spot.memory}, []
        for act in reversed(self._acts):
            if wanted & act.memories:
                wanted |= act.memories
                acts.append(act)
        memories: dict[int, Tensor] = {}
        before = torch.get_rng_state()
        with torch.no_grad():
            for act in reversed(acts):
                _play(act, memories)
        torch.set_rng_state(before)
        return spot.on(memories[spot.memory])

    def digest(self) -> str:
        """Names what was recorded: equal on ranks that would make equal values."""
        sha = hashlib.sha256()
        for act in self._acts:
            sha.update(f"{act.function}{[o.shape for o in act.outputs]}".encode())
            if act.dice is not None:
                sha.update(act.dice.numpy().tobytes())
        return sha.hexdigest()

    def knows(self, tensor: Tensor) -> bool:
        """Whether a tensor has been recorded."""
        return tensor.device.type == "meta" and tensor.untyped_storage()._cdata in self._numbers

    def _is_large(self, func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
        """Whether a call makes a large tensor on the CPU out of nothing."""
        device = kwargs.get("device")
        if "device" not in [argument.name for argument in func._schema.arguments] or str(device or "cpu") != "cpu":
            return False
        if any(isinstance(value, Tensor) for value in tree_flatten((args, kwargs))[0]):
            return False
        shape = args[0] if args and isinstance(args[0], list | tuple | torch.Size) else None
        return shape is not None and math.prod(shape) > self._least

    def _record(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        asked = {"device": torch.device("meta")} if "device" in [a.name for a in func._schema.arguments] else {}
        inputs = tree_map(
            lambda v: self._spot(v) if isinstance(v, Tensor) and self.knows(v) else _copy(v), (args, kwargs)
        )
        on_meta = tree_map(
            lambda v: v.to("meta") if isinstance(v, Tensor) and v.device.type != "meta" else v, (args, kwargs | asked)
        )
        dice = torch.get_rng_state() if _draws(func) else None
        try:
            result = func(*on_meta[0], **on_meta[1])
        except (NotImplementedError, RuntimeError) as error:
            raise JobError(
                f"the model's constructor looks at the values of a large parameter ({func}), which a divided model "
                "does not have while it is built; set layout.defer_above to a number larger than its parameters to "
                f"build it whole on every rank first: {str(error).partition(chr(10))[0]}"
            ) from None
        outputs = tuple(self._spot(value) for value in tree_flatten(result)[0] if isinstance(value, Tensor))
        self._keep(_Act(func, inputs[0], inputs[1], outputs, dice))
        return result

    def whole(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of torch.nn.init that looks at the values it draws, recorded as one act."""

        def fill(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not self.knows(tensor):
                return function(tensor, *args, **kwargs)
            self._keep(_Act(function, (self._spot(tensor), *args), kwargs, (), torch.get_rng_state()))
            return tensor

        return fill

    def _keep(self, act: _Act) -> None:
        """Write an act down; draw, and throw away, what it draws."""
        if act.dice is not None:
            with _disable_current_modes():
                _play(act, {spot.memory: _scratch(spot) for spot in _inputs(act)}, keep_dice=True)
        self._forget_overwritten(act)
        self._acts.append(act)

    def _forget_overwritten(self, act: _Act) -> None:
        """What lay in a memory before all of it was written anew need not be played back."""
        if act.name not in _OVERWRITES:
            return
        [spot] = {value for value in tree_flatten(act.args)[0] if isinstance(value, _Spot)}
        made = next(a for a in self._acts if spot.memory in {o.memory for o in a.outputs})
        if math.prod(spot.shape) != math.prod(made.outputs[0].shape):
            return
        self._acts = [a for a in self._acts if a is made or a.memories != {spot.memory}]

    def _spot(self, tensor: Tensor) -> _Spot:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._numbers:
            self._kept.append(storage)
            self._numbers[storage._cdata] = len(self._kept)
        number = self._numbers[storage._cdata]
        return _Spot(number, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), tensor.dtype)


def build(make: Callable[[], Any], least: int) -> tuple[Any, Deferred]:
    """Call a job's model function; return what it returned, and how to make what it has no values for."""
    mode = Deferred(least)
    known: Any = torch.Tensor.__dict__.get("is_meta") or torch._C.TensorBase.is_meta
    # torch.nn.init passes over tensors on the device meta, and one function looks at what it drew.
    shown = property(lambda tensor: known.__get__(tensor) and not mode.knows(tensor))
    drawn = mode.whole(nn.init._no_grad_trunc_normal_)
    with (
        mode,
        mock.patch.object(torch.Tensor, "is_meta", shown),
        mock.patch.object(nn.init, "_no_grad_trunc_normal_", drawn),
    ):
        model = make()
    if isinstance(model, nn.Module):
        mode.adopt(model)
    return model, mode


def _play(act: _Act, memories: dict[int, Tensor], *, keep_dice: bool = False) -> None:
    if act.is_view and act.outputs and all(output.memory in memories for output in act.outputs):
        return  # a view: windows are cut where they are needed
    args, kwargs = tree_map(
        lambda v: v.on(memories[v.memory]) if isinstance(v, _Spot) else v, (act.args, dict(act.kwargs))
    )
    if act.dice is not None and not keep_dice:
        torch.set_rng_state(act.dice)
    result = act.function(*args, **kwargs)
    if act.outputs:
        values = [value for value in tree_flatten(result)[0] if isinstance(value, Tensor)]
        for output, value in zip(act.outputs, values, strict=True):
            memories.setdefault(output.memory, value)


def _inputs(act: _Act) -> list[_Spot]:
    return [value for value in tree_flatten((act.args, act.kwargs))[0] if isinstance(value, _Spot)]


def _scratch(spot: _Spot) -> Tensor:
    size = spot.offset + 1 + sum((n - 1) * s for n, s in zip(spot.shape, spot.stride, strict=True))
    return torch.empty(size, dtype=spot.dtype)


def _draws(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
