"""One rank's shard of a state as plain tensors: what it takes to go on, without the model that it was trained in.

Which rows of each parameter they are follows from the shard's label, as FSDP2 divides: `Region.of_rows`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from shoal.engine.build import Parts
from shoal.engine.checkpoint import tree
from shoal.engine.exchange.base import copied
from shoal.engine.layout.optimizer_state import load_named, named_state
from shoal.engine.layout.replica import Held, Replica
from shoal.engine.memories import bytes_of
from shoal.engine.progress import Progress
from shoal.engine.shards.choice import Label
from shoal.strategy.layout.region import Region


@dataclass(frozen=True)
class Source:
    """What a shard is taken from: this rank's parts, less the model."""

    replica: Replica
    optimizer: Optimizer
    schedule: LRScheduler | None

    @classmethod
    def of(cls, parts: Parts) -> Source:
        """The tensors stay the parts' own; the model's modules can go, and what they have gathered with them."""
        empty = torch.nn.Module()
        whole = parts.replica
        slim = Replica(empty, whole.parameters, buffers=whole.buffers, total=whole.total, size=whole.size)
        return cls(slim, parts.optimizer, parts.schedule)


@dataclass(frozen=True)
class Shard:
    """One shard.

    Attributes:
        common: what the teller tells for all: progress, schedule, optimizer groups, buffers, and the optimizer's values
            that are not divided; `dtypes`: of what is.
        values: rows of each parameter.
        state: rows of the optimizer's tensors, by parameter and name.
    """

    label: Label
    common: Mapping[str, Any]
    values: Mapping[str, Tensor]
    state: Mapping[str, Mapping[str, Tensor]]

    @classmethod
    def of(cls, label: Label, source: Source, progress: Progress) -> Shard:
        """The live one: its tensors are the source's own, and change with the next update."""
        held = {h.name: h for h in source.replica.parameters}
        named = named_state(source.optimizer, source.replica)
        state, whole = _divided(named["state"], held)
        values = {name: h.local.detach() for name, h in sorted(held.items())}
        common = {
            "progress": progress.to_plain(),
            "schedule": source.schedule.state_dict() if source.schedule else None,
            "groups": named["groups"],
            "buffers": dict(source.replica.buffers),
            "whole": whole,
            "dtypes": {
                name: {"": _name(value.dtype), **{key: _name(t.dtype) for key, t in state.get(name, {}).items()}}
                for name, value in values.items()
            },
        }
        return cls(label, common, values, state)

    @classmethod
    def empty(cls, label: Label, common: Mapping[str, Any], replica: Replica) -> Shard:
        """Room for one: a parameter's own memory where that is the CPU's."""
        values, state = {}, {}
        for held in sorted(replica.parameters, key=lambda h: h.name):
            dtypes = dict(common["dtypes"][held.name])
            dtype = getattr(torch, dtypes.pop(""))
            local = held.local.detach()
            is_here = local.device.type == "cpu" and local.is_contiguous() and local.dtype == dtype
            values[held.name] = local if is_here else torch.empty(held.region.local_shape, dtype=dtype)
            if dtypes:
                state[held.name] = {
                    key: torch.empty(held.region.local_shape, dtype=getattr(torch, kind))
                    for key, kind in sorted(dtypes.items())
                }
        return cls(label, common, values, state)

    def copied(self) -> Shard:
        """A copy, which nothing changes."""
        return dataclasses.replace(
            self, common=copied(self.common), values=copied(self.values), state=copied(self.state)
        )

    def install(self, parts: Parts) -> Progress:
        """Put it into the parts that `empty` made room for; return how far it had come."""
        replica, common = parts.replica, self.common
        with torch.no_grad():
            for held in replica.parameters:
                if self.values[held.name].data_ptr() != held.local.data_ptr():
                    held.local.copy_(self.values[held.name])
            for name, buffer in replica.buffers.items():
                buffer.copy_(common["buffers"][name])
        names = {*common["whole"], *self.state}
        state = {name: {**common["whole"].get(name, {}), **self.state.get(name, {})} for name in names}
        load_named(parts.optimizer, replica, {"state": state, "groups": common["groups"]})
        if parts.schedule is not None and common["schedule"] is not None:
            parts.schedule.load_state_dict(common["schedule"])
        replica.publish()
        return Progress.from_plain(common["progress"])

    def rows(self, shapes: Mapping[str, Sequence[int]], index: int, count: int) -> Iterator[Tensor]:
        """As bytes, all that this shard has of shard `index` of `count`: a state's order is the same on every rank."""
        for name, values in self.values.items():
            own = Region.whole(shapes[name]).of_rows(self.label.index, self.label.count)
            start = own.rows[0][0] if own.rows else 0
            for low, high in Region.whole(shapes[name]).of_rows(index, count).rows:
                first, last = max(low, start), min(high, start + own.num_rows)
                if first < last:
                    for tensor in (values, *self.state.get(name, {}).values()):
                        yield bytes_of(tensor[first - start : last - start].cpu())

    def encode(self) -> tuple[Any, dict[str, Tensor]]:
        """As JSON and tensors."""
        label = dataclasses.astuple(self.label)
        content = {"common": self.common, "values": self.values, "state": self.state}
        document, tensors = tree.encode(content, "shard")
        return {"label": label, "content": document}, tensors

    @classmethod
    def decode(cls, document: Any, tensors: Mapping[str, Tensor]) -> Shard:
        """The inverse of `encode`."""
        return cls(Label(*document["label"]), **tree.decode(document["content"], tensors))


def _divided(
    state: Mapping[str, Mapping[str, Any]], held: Mapping[str, Held]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Any]]]:
    """The optimizer's tensors that lie as the parameters do, and all else that it has."""
    divided: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, dict[str, Any]] = {}
    for name, values in state.items():
        for key, value in sorted(values.items()):
            lies_alike = isinstance(value, Tensor) and tuple(value.shape) == held[name].region.local_shape
            (divided if lies_alike else whole).setdefault(name, {})[key] = value
    return divided, whole


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
