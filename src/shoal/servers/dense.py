"""One piece of a dense parameter on a server, with an optimizer of its own.

Any torch optimizer whose step on a parameter depends on nothing but that parameter works here and gives what it gives
in one process: SGD, Adam, AdamW, Adagrad, RMSprop. One that looks across a whole parameter (LARS, LAMB, Muon) must not
have it cut.

A reader gets whole values: answers are sent from the live memory, and an update that comes while one is still under
way moves on to a copy.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from shoal.strategy.codec import Codec

OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]
ScheduleFactory = Callable[[Optimizer], LRScheduler]


class DensePiece:
    """Values, optimizer and schedule of one key."""

    def __init__(
        self,
        value: Tensor,
        optimizer: OptimizerFactory,
        schedule: ScheduleFactory | None = None,
        codec: Codec | None = None,
    ) -> None:
        """Start from `value`, which becomes this piece's own memory.

        Args:
            codec: how workers may encode their updates; plain ones are taken too.
            schedule: its learning rate advances with each application: each step of bsp, each update of ssp and async.
        """
        self._parameter = nn.Parameter(value)
        self._optimizer = optimizer([self._parameter])
        self._schedule = schedule(self._optimizer) if schedule else None
        self._under_way: list[Any] = []
        self._codec = codec
        self.version = 0

    @property
    def size_bytes(self) -> int:
        """Of the values, without the optimizer's state."""
        return self._parameter.numel() * self._parameter.element_size()

    def decoded(self, update: Tensor) -> Tensor:
        """An update as values, if it came encoded and is as long as it has to be; else as it is."""
        value = self._parameter
        if self._codec is None or update.dtype != torch.uint8 or value.dtype == torch.uint8:
            return update
        if update.shape != (self._codec.size_bytes(value.numel(), value.element_size()),):
            return update
        return self._codec.decode(update.view(1, -1), value.numel(), value.detach())[0].view_as(value)

    def check(self, update: Tensor) -> str | None:
        """Why `update` does not fit, or None."""
        if update.shape == self._parameter.shape and update.dtype == self._parameter.dtype:
            return None
        return (
            f"got an update of shape {tuple(update.shape)} {update.dtype}, "
            f"expected {tuple(self._parameter.shape)} {self._parameter.dtype}"
        )

    def apply(self, updates: list[Tensor]) -> None:
        """Sum `updates` in this order and take one step. Does not write to them."""
        self._leave_readers_behind()
        total = updates[0]
        if len(updates) > 1:
            total = updates[0] + updates[1]
            for update in updates[2:]:
                total.add_(update)
        self._parameter.grad = total
        self._optimizer.step()
        self._parameter.grad = None
        if self._schedule is not None:
            self._schedule.step()
        self.version += 1

    def read(self) -> Tensor:
        """The values, on live memory; give what `Listener.send` returns for it to `sent`."""
        return self._parameter.detach()

    def sent(self, trackers: list[Any]) -> None:
        """These sends read the values' memory until they are done."""
        self._under_way = [tracker for tracker in self._under_way if not tracker.done] + trackers

    def dump(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """A copy of everything that a resume needs: a JSON document and tensors by name."""
        state = self._optimizer.state_dict()
        tensors = {"value": self._parameter.detach().clone()}
        scalars: dict[str, Any] = {}
        for name, item in state["state"].get(0, {}).items():
            if isinstance(item, Tensor):
                tensors[f"optimizer/{name}"] = item.clone()
            else:
                scalars[name] = item
        group = {name: item for name, item in state["param_groups"][0].items() if _plain(item)}
        schedule = self._schedule.state_dict() if self._schedule else {}
        schedule = {name: item for name, item in schedule.items() if _plain(item)}
        return {"version": self.version, "scalars": scalars, "group": group, "schedule": schedule}, tensors

    def restore(self, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Take the optimizer's state over from a `dump`; the values came with the constructor."""
        state = {
            name.removeprefix("optimizer/"): tensor.clone() for name, tensor in tensors.items() if name != "value"
        } | dict(document["scalars"])
        own = self._optimizer.state_dict()
        group = own["param_groups"][0] | dict(document["group"])
        self._optimizer.load_state_dict({"state": {0: state} if state else {}, "param_groups": [group]})
        if self._schedule is not None:
            self._schedule.load_state_dict(self._schedule.state_dict() | dict(document["schedule"]))
        self.version = int(document["version"])

    def _leave_readers_behind(self) -> None:
        if any(not tracker.done for tracker in self._under_way):
            self._parameter.data = self._parameter.detach().clone()
        self._under_way.clear()


def _plain(item: Any) -> bool:
    try:
        json.dumps(item)
    except (TypeError, ValueError):
        return False
    return True
