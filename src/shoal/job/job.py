"""The noun `Job`: model, loss, data, optimizer, metrics, schedule; no base class, nothing inside the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset

from shoal.errors import JobError

Loss = Callable[[nn.Module, Any], Tensor | tuple[Tensor, Any]]
Metric = Callable[[Any, Any], Tensor | float]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained. Every rank calls the factories and builds its own parts.

    Attributes:
        model: makes the model, on the CPU; Shoal moves it to the rank's device.
        data: makes the training data, a map-style dataset, or a pair (training, validation).
        loss: `loss(model, batch)`: the mean over the batch's samples, a scalar. It may return a pair (loss, outputs);
            the outputs go to the metrics.
        optimizer: makes the optimizer from the parameters that require a gradient.
        metrics: by name, `metric(outputs, batch)`: the mean over the batch's samples; computed in validation.
        schedule: makes a learning-rate scheduler from the optimizer; stepped once after every optimizer step.
        sample: `sample(model)` returns text that shows what the trained model does; part of the report.
        collate: joins samples into a batch; default: PyTorch's.
        tensor: for the layout's tensor axis, patterns of module names -> "columns", "rows", "fused", "vocabulary",
            "head" or "whole"; default: a table of usual names (docs/layouts.md).
    """

    model: Callable[[], nn.Module]
    data: Callable[[], Dataset[Any] | tuple[Dataset[Any], Dataset[Any]]]
    loss: Loss
    optimizer: Callable[[Any], Optimizer]
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    schedule: Callable[[Optimizer], LRScheduler] | None = None
    sample: Callable[[nn.Module], str] | None = None
    collate: Callable[[list[Any]], Any] | None = None
    tensor: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parts = {name: getattr(self, name) for name in ("model", "data", "loss", "optimizer")}
        optional = {name: getattr(self, name) for name in ("schedule", "sample", "collate")}
        parts |= {name: value for name, value in optional.items() if value is not None}
        parts |= {f"metrics[{name!r}]": metric for name, metric in self.metrics.items()}
        for name, value in parts.items():
            if not callable(value) or isinstance(value, nn.Module):
                raise JobError(
                    f"Job({name}=...) got {type(value).__name__}, expected a function that every rank calls to build "
                    f"its own, e.g. {name}=lambda: ..."
                )
