"""One forward pass as the plan wants it: on the right device, in the right precision, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shoal.errors import JobError
from shoal.job.job import Loss


class Forward:
    """Computes a job's loss on one batch."""

    def __init__(self, model: nn.Module, loss: Loss, device: torch.device, precision: str) -> None:
        self.model = model
        self.loss = loss
        self.device = device
        self._autocast = precision == "bf16"

    def __call__(self, samples: Any) -> tuple[Tensor, Any, Any]:
        """Return (mean loss, outputs or None, samples on the device).

        Raises:
            JobError: the loss is not a scalar, or lies on another device.
        """
        moved = to_device(samples, self.device)
        loss, outputs = self.loss_of(self.model, moved)
        return loss, outputs, moved

    @property
    def has_outputs(self) -> bool:
        """Whether this rank gets the loss and the outputs."""
        return True

    def loss_of(self, model: nn.Module, moved: Any) -> tuple[Tensor, Any]:
        """The mean loss on samples that are on the device, and the model's outputs if the job gives them."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._autocast):
            result = self.loss(model, moved)
        loss, outputs = result if isinstance(result, tuple) else (result, None)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise JobError(f"the job's loss returned {got}, expected one number: the mean over the batch's samples")
        if loss.device.type != self.device.type:
            raise JobError(
                f"the job's loss is on {loss.device}, but this rank computes on {self.device}; take the device from "
                "the batch or the model instead of naming it"
            )
        return loss.reshape(()), outputs


def to_device(samples: Any, device: torch.device) -> Any:
    """Move every tensor in nested tuples, lists and mappings; anything else stays as it is."""
    match samples:
        case Tensor():
            return samples.to(device, non_blocking=True) if device.type != "cpu" else samples
        case tuple() if hasattr(samples, "_fields"):
            return type(samples)(*(to_device(item, device) for item in samples))
        case tuple() | list():
            return type(samples)(to_device(item, device) for item in samples)
        case Mapping():
            return {key: to_device(item, device) for key, item in samples.items()}
        case _:
            return samples
