"""A codec's bytes are as many as it says, and decode to the values, as exactly as it promises."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from shoal.strategy.codec import CODECS
from shoal.strategy.codec.bf16 import Bf16Codec
from shoal.strategy.codec.none import NoneCodec

SHAPES = [(1, 0), (3, 0), (1, 1), (1, 997), (4, 64), (7, 13)]
RELATIVE_ERROR = {"none": 0.0, "bf16": 2.0**-8}


def values(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    exponents = torch.randint(-30, 30, shape, generator=generator)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 2.0**exponents).to(dtype)


def test_the_table_holds_what_is_tested_here() -> None:
    assert {"none": NoneCodec, "bf16": Bf16Codec} == CODECS
    assert RELATIVE_ERROR.keys() == CODECS.keys()


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_bytes_are_as_many_as_promised_and_decode_to_the_values(
    name: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    codec, original = make(name), values(shape, dtype)
    before = original.clone()
    payload = codec.encode(original, 0)
    assert payload.dtype == torch.uint8
    assert payload.shape == (shape[0], codec.size_bytes(shape[1], dtype.itemsize))
    decoded = codec.decode(payload, shape[1], original)
    assert decoded.dtype == dtype
    assert decoded.shape == shape
    assert torch.equal(original, before)
    assert ((decoded.double() - original.double()).abs() <= RELATIVE_ERROR[name] * original.double().abs()).all()


@pytest.mark.parametrize("name", CODECS)
def test_what_was_decoded_once_does_not_change_again(name: str) -> None:
    codec, original = make(name), values((3, 97), torch.float32)
    once = codec.decode(codec.encode(original, 0), like=original)
    assert torch.equal(codec.decode(codec.encode(once), like=once), once)


@pytest.mark.parametrize("name", CODECS)
def test_special_values_stay_what_they_are(name: str) -> None:
    codec, special = make(name), torch.tensor([[0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -2.0]])
    decoded = codec.decode(codec.encode(special), like=special)
    torch.testing.assert_close(decoded, special, rtol=0, atol=0, equal_nan=True)
    assert torch.signbit(decoded)[0].tolist()[:4] == [False, True, False, True]


@pytest.mark.parametrize("name", CODECS)
def test_rows_that_do_not_lie_in_order_are_encoded_in_order(name: str) -> None:
    codec, rows = make(name), torch.arange(12.0).view(3, 4)
    decoded = codec.decode(codec.encode(rows.t()), like=rows)
    assert torch.equal(decoded, rows.t())


@pytest.mark.parametrize("name", CODECS)
def test_a_linear_codecs_bytes_are_the_values_own(name: str) -> None:
    codec, rows = make(name), values((2, 5), torch.float32)
    own = codec.size_bytes(5, 4) == 20 and torch.equal(codec.encode(rows).view(torch.float32), rows)
    assert codec.linear == own


def test_bf16_rounds_to_nearest_even() -> None:
    unit = 2.0**-7  # the distance of neighbours just above 1
    original = torch.tensor([[1 + 0.49 * unit, 1 + 0.5 * unit, 1 + 0.51 * unit, 1 + 1.5 * unit]])
    decoded = Bf16Codec().decode(Bf16Codec().encode(original), like=original)
    assert decoded.tolist() == [[1.0, 1.0, 1 + unit, 1 + 2 * unit]]


def test_bf16_takes_two_bytes_whatever_the_values_take() -> None:
    assert [Bf16Codec().size_bytes(10, item) for item in (2, 4, 8)] == [20, 20, 20]
    assert [NoneCodec().size_bytes(10, item) for item in (2, 4, 8)] == [20, 40, 80]


def test_bf16_is_wrong_by_at_most_one_part_in_256() -> None:
    original = torch.cat([torch.logspace(-37, 37, 999), -torch.logspace(-37, 37, 999), torch.zeros(2)]).view(2, -1)
    decoded = Bf16Codec().decode(Bf16Codec().encode(original), like=original)
    assert torch.all((decoded - original).abs() <= 2**-8 * original.abs())
