"""Every way to sum a tensor over a group gives every member the same sum, for any size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.ops import WORLD
from shoal.strategy.sync.algorithms import ALGORITHMS
from shoal.wire.inprocess import run_in_process


@pytest.mark.parametrize("name", ALGORITHMS)
@given(size=st.integers(1, 9), num_values=st.sampled_from([0, 1, 2, 3, 7, 8, 31, 64]), seed=st.integers(0, 99))
def test_every_member_gets_the_same_sum(name: str, size: int, num_values: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(size, num_values, generator=generator, dtype=torch.float64)  # (members, n)
    held = [row.clone() for row in values]
    run_in_process(
        [ALGORITHMS[name](tensor, WORLD, index, size) for index, tensor in enumerate(held)],
        lambda rank, group: range(size),
    )
    for tensor in held:
        torch.testing.assert_close(tensor, values.sum(dim=0), rtol=1e-13, atol=1e-13)
        assert torch.equal(tensor, held[0])
