"""What every codec promises of itself."""

from __future__ import annotations

import pytest
import torch

from shoal.strategy.codec import CODECS


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("num_values", [0, 1, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_row_takes_the_bytes_that_the_codec_says(name: str, num_values: int, dtype: torch.dtype) -> None:
    codec = CODECS[name]()
    values = torch.randn(3, num_values).to(dtype)
    payload = codec.encode(values)
    assert payload.dtype == torch.uint8
    assert payload.shape == (3, codec.size_bytes(num_values, dtype.itemsize))
    decoded = codec.decode(payload, like=values)
    assert decoded.shape == values.shape
    assert decoded.dtype == dtype


def test_none_changes_nothing() -> None:
    values = torch.randn(4, 9, dtype=torch.float64)
    codec = CODECS["none"]()
    assert torch.equal(codec.decode(codec.encode(values), like=values), values)


def test_bf16_rounds_to_nearest_by_at_most_one_part_in_256() -> None:
    values = torch.cat([torch.logspace(-37, 37, 999), -torch.logspace(-37, 37, 999), torch.zeros(2)]).view(2, -1)
    codec = CODECS["bf16"]()
    decoded = codec.decode(codec.encode(values), like=values)
    assert torch.all((decoded - values).abs() <= 2**-8 * values.abs())


def test_bf16_sends_half_the_bytes_of_fp32() -> None:
    assert CODECS["bf16"]().size_bytes(1000, 4) * 2 == CODECS["none"]().size_bytes(1000, 4)
