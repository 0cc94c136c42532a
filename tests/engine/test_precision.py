"""Autocast computes in bfloat16 and leaves the parameters as the model made them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shoal.engine.forward import Forward

CPU = torch.device("cpu")


def loss(model: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
    outputs = model(batch)
    return outputs.float().square().mean(), outputs


def test_bf16_is_the_precision_of_the_forward_and_not_of_the_parameters() -> None:
    model = nn.Linear(64, 64)
    batch = torch.randn(8, 64)
    exact, exact_outputs, _ = Forward(model, loss, CPU, "fp32")(batch)
    rounded, outputs, _ = Forward(model, loss, CPU, "bf16")(batch)
    rounded.backward()
    assert (exact_outputs.dtype, outputs.dtype) == (torch.float32, torch.bfloat16)
    assert model.weight.grad is not None
    assert model.weight.dtype == model.weight.grad.dtype == torch.float32
    assert rounded != exact
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0)
