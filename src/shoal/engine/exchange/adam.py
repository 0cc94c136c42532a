"""Adam where compressed momentum is exchanged, and its second moment stands still meanwhile.

A codec's error is noise to Adam: it swells the second moment, and steps shrink. 1-bit Adam (Tang et al. 2021) learns
the second moment from uncompressed gradients at first, freezes it, and compresses the momentum; 0/1 Adam (Lu et al.
2022) lets it learn on, now and then. Here the gradients of every so many steps go whole or as int8, and the job's own
optimizer takes those learning steps.
In the steps between it is passed over: this module applies the momentum, with the optimizer's own state and settings.

A gradient cannot be clipped by its norm before it is summed, so the momentum takes the factor of the last learning
step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Adam, AdamW, Optimizer

from shoal.engine.exchange.buckets import GradientBuckets
from shoal.errors import JobError
from shoal.strategy.codec.feedback import Coder
from shoal.strategy.codec.momentum import Momentum

_LEAST_UNIT = 1e-3  # of the bucket's root mean square: in units of 0, what was never seen before would be all there is


class CompressedAdam:
    """One rank's optimizer; every rank does the same with its own."""

    def __init__(self, optimizer: Optimizer, buckets: GradientBuckets, coder: Coder) -> None:
        """No momentum is compressed before the first learning step.

        Raises:
            JobError: the optimizer is none of which this module knows the update.
        """
        _check(optimizer)
        self._optimizer, self._buckets, self._coder = optimizer, buckets, coder
        values = [bucket.target[: bucket.num_values] for bucket in buckets.buckets]
        decay = float(optimizer.param_groups[0]["betas"][0])
        for bucket, like in zip(buckets.buckets, values, strict=True):
            coder.momenta[bucket.name] = Momentum(torch.zeros_like(like), torch.ones_like(like), decay)
        self._momenta = [coder.momenta[bucket.name] for bucket in buckets.buckets]
        self._roots = [torch.zeros_like(like) for like in values]
        self._mean_of = dict(buckets.views([momentum.mean for momentum in self._momenta]))
        self._root_of = dict(buckets.views(self._roots))
        self._arrived = dict(buckets.views(values))
        self._held = dict.fromkeys(self._mean_of, 0)
        self._taken: set[nn.Parameter] = set()
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self._before_step()),
            optimizer.register_step_post_hook(lambda *_: self._after_step()),
        ]

    @property
    def compressed(self) -> bool:
        """Whether this step's exchange is of momentum."""
        return self._coder.compresses(self._buckets.buckets[0].name)

    def clipped(self, norm: float, max_norm: float) -> None:
        """A learning step's gradient of this norm was clipped."""
        for momentum in self._momenta:
            momentum.factor = min(1.0, max_norm / (norm + 1e-6))

    def state_dict(self) -> dict[str, Any]:
        """What the optimizer's own state does not tell."""
        return {"held": list(self._held.values()), "factor": self._momenta[0].factor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`'s value; the optimizer has its state back already."""
        self._held = dict(zip(self._held, state["held"], strict=True))
        for momentum in self._momenta:
            momentum.factor = state["factor"]
        self._read_state()

    def close(self) -> None:
        """Leave the optimizer alone."""
        for hook in self._hooks:
            hook.remove()

    def _before_step(self) -> None:
        """In a compressed step take the gradients away from the optimizer."""
        self._taken = {p for p in self._mean_of if p.grad is not None}
        if self.compressed:
            for parameter in self._taken:
                parameter.grad = None
            return
        for parameter, group in self._parameters():
            if self._held[parameter]:  # the bias correction goes on with each step, the estimate did not
                state, decay = self._optimizer.state[parameter], group["betas"][1]
                step = float(state["step"])
                state["exp_avg_sq"].mul_((1 - decay**step) / (1 - decay ** (step - self._held[parameter])))
                self._held[parameter] = 0

    def _after_step(self) -> None:
        """Learn from the step that the optimizer has taken; or take it here, where it was passed over."""
        if not self.compressed:
            self._read_state()
            return
        with torch.no_grad():
            for parameter, group in self._parameters():
                self._update(parameter, group)

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state, mean = self._optimizer.state[parameter], self._mean_of[parameter]
        if "exp_avg" not in state:  # its first gradient came compressed: there is no second moment to go by
            return
        state["step"] += 1
        self._held[parameter] += 1
        mean.copy_(self._arrived[parameter])
        state["exp_avg"].copy_(mean)
        rate, decay = float(group["lr"]), group["betas"][0]
        parameter.mul_(1 - rate * group["weight_decay"])
        step_size = rate / (1 - decay ** float(state["step"]))
        parameter.addcdiv_(mean, self._root_of[parameter] + group["eps"], value=-step_size)

    def _parameters(self) -> Iterator[tuple[nn.Parameter, dict[str, Any]]]:
        """Those that have a gradient in this step, each with its group."""
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in self._taken:
                    yield parameter, group

    def _read_state(self) -> None:
        """Take momentum and second moment over from the optimizer."""
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                state = self._optimizer.state.get(parameter, {})
                if parameter in self._mean_of and "exp_avg" in state:
                    self._mean_of[parameter].copy_(state["exp_avg"])
                    known = float(state["step"]) - self._held[parameter]
                    torch.div(state["exp_avg_sq"], 1 - group["betas"][1] ** known, out=self._root_of[parameter])
                    self._root_of[parameter].sqrt_()
        for momentum, root in zip(self._momenta, self._roots, strict=True):
            least = _LEAST_UNIT * float(torch.linalg.vector_norm(root)) / max(root.numel(), 1) ** 0.5
            torch.clamp(root, min=max(least, torch.finfo(root.dtype).tiny), out=momentum.units)


def _check(optimizer: Optimizer) -> None:
    known = isinstance(optimizer, Adam)
    groups = optimizer.param_groups
    decoupled = isinstance(optimizer, AdamW) or all(
        g.get("decoupled_weight_decay") or not g.get("weight_decay") for g in groups
    )
    plain = known and not any(group["amsgrad"] or group["maximize"] for group in groups)
    if not plain or not decoupled or len({group["betas"][0] for group in groups}) > 1:
        raise JobError(
            f"codec.variance_every needs torch.optim.AdamW, or Adam without weight decay, neither with amsgrad or "
            f"maximize, and one beta1 for all groups; the job's optimizer is {optimizer}; change it, or leave "
            "variance_every out of the plan"
        )
