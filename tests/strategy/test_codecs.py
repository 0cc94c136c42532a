"""A codec's bytes are as many as it says, and decode to the values, as exactly as it promises."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shoal.errors import UsageError
from shoal.plan import parse_plan
from shoal.strategy.bucket import Piece
from shoal.strategy.codec import CODECS, make_codec
from shoal.strategy.codec.base import EchoingCodec
from shoal.strategy.codec.bf16 import Bf16Codec, Bf16Config
from shoal.strategy.codec.draw import DRAW_BITS, draw
from shoal.strategy.codec.fp16 import Fp16Codec, Fp16Config
from shoal.strategy.codec.int2 import Int2Codec, Int2Config
from shoal.strategy.codec.int4 import Int4Codec, Int4Config
from shoal.strategy.codec.int8 import Int8Codec, Int8Config
from shoal.strategy.codec.none import NoneCodec
from shoal.strategy.codec.onebit import OneBitCodec, OneBitConfig
from shoal.strategy.codec.packing import pack, unpack
from shoal.strategy.codec.powersgd import PowerSgdCodec, PowerSgdConfig
from shoal.strategy.codec.qsgd import QsgdCodec, QsgdConfig
from shoal.strategy.codec.randomk import RandomKCodec, RandomKConfig
from shoal.strategy.codec.sign import SignCodec, SignConfig
from shoal.strategy.codec.terngrad import TernGradCodec, TernGradConfig
from shoal.strategy.codec.topk import TopKCodec, TopKConfig

SHAPES = [(1, 0), (3, 0), (0, 5), (1, 1), (3, 1), (1, 997), (4, 64), (7, 13), (2, 3001)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
ELEMENTWISE = ["none", "bf16"]  # each value goes its own way: no chunk, no choice
ALL_BUT_NONE = [name for name in CODECS if name != "none"]
DRAWS = 400


def make(name: str) -> Any:
    """The codec with its default settings."""
    return make_codec(parse_plan(f'codec.kind = "{name}"', origin="test").codec)


def gaussian(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def wide(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of magnitudes from 2**-30 to 2**30."""
    exponents = torch.randint(-30, 30, shape, generator=torch.Generator().manual_seed(2))
    return (gaussian(*shape, dtype=torch.float64) * 2.0**exponents).to(dtype)


def there_and_back(codec: Any, values: Tensor, key: int = 0) -> Tensor:
    return codec.decode(codec.encode(values, key), values.shape[1], values)


def by_chunk(values: Tensor, chunk: int) -> Tensor:
    """Shape (chunks, chunk) of one row, the last filled up with zeros."""
    return torch.nn.functional.pad(values[0], (0, -values.shape[1] % chunk)).view(-1, chunk)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_are_as_many_as_promised_on_every_device(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    codec, original = make(name), wide(*shape, dtype=dtype)
    before = original.clone()
    payload = codec.encode(original, 7)
    assert payload.dtype == torch.uint8
    assert payload.shape == (shape[0], codec.size_bytes(shape[1], dtype.itemsize))
    decoded = codec.decode(payload, shape[1], original)
    assert decoded.dtype == dtype
    assert decoded.shape == shape
    assert torch.equal(original, before)
    shadow = original.to("meta")
    assert codec.encode(shadow, 7).shape == payload.shape
    assert codec.decode(payload.to("meta"), shape[1], shadow).shape == shape


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_values_and_key_give_the_same_bytes(name: str, dtype: torch.dtype) -> None:
    codec, original = make(name), gaussian(2, 1001, dtype=dtype)
    assert torch.equal(codec.encode(original, 5), codec.encode(original.clone(), 5))


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_echo_is_what_will_be_decoded(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    codec, original = make(name), wide(*shape, dtype=dtype)
    if isinstance(codec, EchoingCodec):
        payload, decoded = codec.encode_decoded(original, 3)
        assert torch.equal(payload, codec.encode(original, 3))
        assert torch.equal(decoded, codec.decode(payload, shape[1], original))


@pytest.mark.parametrize("name", CODECS)
def test_rows_are_encoded_one_by_one(name: str) -> None:
    codec, rows = make(name), gaussian(3, 600)
    decoded = there_and_back(codec, rows)
    if name not in ("qsgd", "terngrad"):  # they draw for each row anew
        each = torch.cat([there_and_back(codec, row[None]) for row in rows])
        torch.testing.assert_close(decoded, each, rtol=1e-5, atol=1e-5)
    columns = rows.t().contiguous().t()
    torch.testing.assert_close(there_and_back(codec, columns), decoded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CODECS)
def test_zeros_stay_zeros(name: str) -> None:
    zeros = torch.zeros(2, 300)
    assert torch.equal(there_and_back(make(name), zeros).abs(), zeros)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1500, 2999])
def test_a_value_that_is_not_finite_is_heard_of(name: str, bad: float, place: int) -> None:
    codec, original = make(name), gaussian(1, 3000)
    original[0, place] = bad
    decoded = there_and_back(codec, original)
    first = place // 1024 * 1024
    assert not decoded[0, first : first + 1024].isfinite().all()
    if name not in ("powersgd", *ELEMENTWISE):
        assert decoded[0, : first or None].isfinite().all() or first == 0


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_special_values_stay_what_they_are(name: str) -> None:
    special = torch.tensor([[0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -2.0]])
    decoded = there_and_back(make(name), special)
    torch.testing.assert_close(decoded, special, rtol=0, atol=0, equal_nan=True)
    assert torch.signbit(decoded)[0].tolist()[:4] == [False, True, False, True]


@pytest.mark.parametrize("name", ["none", "bf16", "fp16", "topk"])
def test_what_was_decoded_once_does_not_change_again(name: str) -> None:
    codec = make(name)
    once = there_and_back(codec, wide(3, 970))
    assert torch.equal(there_and_back(codec, once), once)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e30])
def test_very_small_and_very_large_values_stay_finite(name: str, scale: float) -> None:
    original = gaussian(1, 2000) * scale
    decoded = there_and_back(make(name), original)
    assert decoded.isfinite().all()
    assert decoded.double().norm() <= 3 * original.double().norm() + 1e-36


@given(bits=st.sampled_from([1, 2, 4, 8]), groups=st.integers(1, 20), seed=st.integers(0, 2**31))
def test_packed_codes_come_back(bits: int, groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (3, groups, 8), generator=generator, dtype=torch.uint8)
    packed = pack(codes.clone(), bits)
    assert packed.shape == (3, groups, bits)
    assert torch.equal(unpack(packed, bits), codes)


def test_draws_are_uniform_and_differ_by_key() -> None:
    keys = torch.tensor([[0], [1], [2**40], [2**40 + 1]])
    drawn = draw(keys, 100_000).double() / 2**DRAW_BITS
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert (drawn.mean(dim=1) - 0.5).abs().max() < 0.005  # 5 standard errors: 5 * 0.29 / sqrt(100000)
    assert (drawn.var(dim=1) - 1 / 12).abs().max() < 0.002
    off_diagonal = torch.corrcoef(drawn) - torch.eye(4, dtype=torch.float64)
    assert off_diagonal.abs().max() < 0.016  # 5 / sqrt(100000)
    successive = torch.corrcoef(torch.stack([drawn[0, :-1], drawn[0, 1:]]))
    assert abs(successive[0, 1]) < 0.016


# Each codec's own promise.


def test_none_changes_nothing() -> None:
    original = wide(3, 97, dtype=torch.float64)
    assert torch.equal(there_and_back(NoneCodec(None), original), original)


def test_bf16_rounds_to_nearest_even() -> None:
    unit = 2.0**-7  # the distance of neighbours just above 1
    original = torch.tensor([[1 + 0.49 * unit, 1 + 0.5 * unit, 1 + 0.51 * unit, 1 + 1.5 * unit]])
    assert there_and_back(Bf16Codec(Bf16Config()), original).tolist() == [[1.0, 1.0, 1 + unit, 1 + 2 * unit]]


def test_bf16_is_wrong_by_at_most_one_part_in_256() -> None:
    original = torch.cat([torch.logspace(-37, 37, 999), -torch.logspace(-37, 37, 999), torch.zeros(2)]).view(2, -1)
    decoded = there_and_back(Bf16Codec(Bf16Config()), original)
    assert torch.all((decoded - original).abs() <= 2**-8 * original.abs())


@pytest.mark.parametrize("magnitude", [1e-20, 1.0, 1e20])
def test_fp16_is_as_exact_at_every_magnitude(magnitude: float) -> None:
    original = gaussian(2, 3000) * magnitude
    decoded = there_and_back(Fp16Codec(Fp16Config()), original)
    largest = original.abs().max()
    assert torch.all((decoded - original).abs() <= (2**-11 * original.abs()).clamp(min=2.0**-38 * largest))


@pytest.mark.parametrize(("codec", "levels"), [(Int8Codec(Int8Config()), 127), (Int4Codec(Int4Config()), 7)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_are_wrong_by_at_most_half_a_scale(codec: Any, levels: int, dtype: torch.dtype) -> None:
    original = wide(1, 3000, dtype=dtype)
    chunk = 1024 if levels == 127 else 256
    error = by_chunk((there_and_back(codec, original) - original).double().abs(), chunk)
    largest = by_chunk(original.double().abs(), chunk).amax(dim=1, keepdim=True)
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 1e-6
    assert torch.all(error <= largest / levels / 2 + rounding * largest)


@pytest.mark.parametrize(
    "codec", [TernGradCodec(TernGradConfig()), QsgdCodec(QsgdConfig()), QsgdCodec(QsgdConfig(levels=127))]
)
def test_stochastic_rounding_has_no_bias_and_the_variance_of_a_coin(codec: Any) -> None:
    original = gaussian(1, 300, dtype=torch.float64)
    decoded = torch.cat([there_and_back(codec, original, key) for key in range(DRAWS)])
    levels = codec._levels
    scale = by_chunk(original.abs(), 256).amax(dim=1, keepdim=True).repeat(1, 256).view(1, -1)[:, :300] / levels
    deviation = scale / 2  # of one draw at most: a coin between two neighbours
    assert torch.all((decoded.mean(dim=0) - original).abs() <= 5 * deviation / DRAWS**0.5)
    assert torch.all((decoded - original).abs() <= scale * (1 + 1e-6))
    fraction = (original / scale) % 1
    variance = scale.square() * fraction * (1 - fraction)
    assert torch.allclose(decoded.var(dim=0).sum(), variance.sum(), rtol=0.05)


def test_terngrad_takes_three_values_a_chunk() -> None:
    decoded = there_and_back(TernGradCodec(TernGradConfig()), gaussian(1, 256))
    assert len(decoded.unique()) == 3


@pytest.mark.parametrize("num_values", [1, 7, 128, 129, 3000])
def test_two_bits_leave_the_error_of_the_best_four_equal_steps(num_values: int) -> None:
    original = gaussian(1, num_values, dtype=torch.float64)
    decoded = there_and_back(Int2Codec(Int2Config()), original)
    error, whole = (decoded - original).square().sum(), original.square().sum()
    assert error <= whole
    if num_values == 3000:
        assert error / whole == pytest.approx(
            0.1188, rel=0.1
        )  # Max 1960, table II: the least for a normal distribution
    left = by_chunk((decoded - original) * decoded, 128).sum(dim=1).abs()  # zero, but for the scale's rounding
    assert torch.all(left <= 2.0**-8 * by_chunk(decoded.square(), 128).sum(dim=1) + 1e-9)


@pytest.mark.parametrize("num_values", [1, 7, 128, 129, 3000])
def test_signs_contract_as_the_paper_says(num_values: int) -> None:
    original = gaussian(1, num_values, dtype=torch.float64)
    decoded = there_and_back(SignCodec(SignConfig()), original)
    assert torch.equal(decoded < 0, original < 0)
    error = by_chunk(decoded - original, 128).square().sum(dim=1)
    sizes = torch.tensor([min(128, num_values - first) for first in range(0, num_values, 128)])
    whole = by_chunk(original, 128).square().sum(dim=1)
    expected = whole - by_chunk(original.abs(), 128).sum(dim=1).square() / sizes
    assert torch.all((error - expected).abs() <= 2.0**-16 * whole + 1e-9)  # the mean is rounded by 2**-9: its square


@pytest.mark.parametrize("num_values", [1, 7, 128, 129, 3000])
def test_one_bit_decodes_to_the_mean_of_either_side(num_values: int) -> None:
    original = gaussian(1, num_values, dtype=torch.float64) + 0.3
    decoded = there_and_back(OneBitCodec(OneBitConfig()), original)
    for first in range(0, num_values, 128):
        chunk, back = original[0, first : first + 128], decoded[0, first : first + 128]
        for side in (chunk < 0, chunk >= 0):
            if side.any():
                mean = chunk[side].mean().expand(int(side.sum()))
                torch.testing.assert_close(back[side], mean, rtol=2.0**-7, atol=2.0**-8)


@pytest.mark.parametrize("num_values", [1, 5, 256, 300, 3000])
@pytest.mark.parametrize("ratio", [0.001, 0.1, 1.0])
def test_top_k_keeps_the_largest_of_every_chunk(num_values: int, ratio: float) -> None:
    original = wide(1, num_values)
    decoded = there_and_back(TopKCodec(TopKConfig(ratio=ratio)), original)
    chunk = min(256, num_values)
    k = max(1, round(ratio * chunk))
    magnitudes = by_chunk(original.abs(), chunk)
    kept = by_chunk(decoded, chunk) != 0
    assert kept.sum() <= k * len(kept)
    smallest_kept = torch.where(kept, magnitudes, math.inf).amin(dim=1)
    largest_left = torch.where(kept, 0, magnitudes).amax(dim=1)
    assert torch.all(smallest_kept >= largest_left * (1 - 2.0**-14))
    assert torch.all((decoded - original).abs()[decoded != 0] <= 2**-8 * original.abs()[decoded != 0])
    error, whole = by_chunk(decoded - original, chunk).square().sum(1), magnitudes.square().sum(1)
    assert torch.all(error <= (1 - k / chunk + 2.0**-16) * whole)


@pytest.mark.parametrize("num_values", [1, 15, 16, 17, 1000])
def test_random_k_keeps_one_of_each_group_and_the_right_part_on_average(num_values: int) -> None:
    codec, original = RandomKCodec(RandomKConfig()), gaussian(1, num_values, dtype=torch.float64) + 3
    decoded = torch.cat([there_and_back(codec, original, key << 20) for key in range(DRAWS)])
    kept = decoded != 0
    assert torch.equal(decoded[kept], original.expand_as(decoded)[kept])
    assert torch.all(kept.sum(dim=1) == -(-num_values // 16))
    # Each value is kept once in 16 draws (more often in a smaller last group): within 6 standard deviations.
    whole = num_values // 16 * 16
    assert torch.all((kept.double().mean(dim=0)[:whole] - 1 / 16).abs() < 6 * (15 / 256 / DRAWS) ** 0.5)
    error = (decoded - original)[:, :whole].square().sum(dim=1).mean()
    assert torch.allclose(error, 15 / 16 * original[:, :whole].square().sum(), rtol=0.05)


def test_random_k_without_feedback_has_no_bias() -> None:
    codec, original = RandomKCodec(RandomKConfig(error_feedback=False)), gaussian(1, 37, dtype=torch.float64)
    decoded = torch.cat([there_and_back(codec, original, key) for key in range(DRAWS * 10)])
    assert torch.all((decoded.mean(dim=0) - original).abs() <= 6 * original.abs() * (15 / DRAWS / 10) ** 0.5)


# Projections that are summed over ranks.


def summed(
    codec: Any, contributions: list[Tensor], pieces: list[Piece], memories: list[dict[str, Tensor]], key: int
) -> Any:
    """Play the ranks of one projection: each one's (total, own), and the bytes of every round."""
    ranks = [codec.project(c, pieces, m, key) for c, m in zip(contributions, memories, strict=True)]
    results: list[tuple[Tensor, Tensor]] = []
    num_bytes = 0
    while len(results) < len(ranks):
        yielded = []
        for rank in ranks:
            try:
                yielded.append(next(rank))
            except StopIteration as stop:
                results.append(stop.value)
        if yielded:
            total = torch.stack(yielded).sum(dim=0)
            num_bytes += total.nbytes
            for mine in yielded:
                mine.copy_(total)
    return results, num_bytes


@pytest.mark.parametrize("name", [name for name, codec in CODECS.items() if codec.linear])
@pytest.mark.parametrize("num_values", [0, 1, 100, 4003])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_projections_total_is_the_sum_of_all_ranks_own(name: str, num_values: int, dtype: torch.dtype) -> None:
    codec = make(name)
    pieces = [Piece(3, torch.Size([50, 8, 10]))] if num_values > 4003 - 1 else []
    contributions = [gaussian(num_values, dtype=dtype, seed=seed) for seed in range(3)]
    before = [c.clone() for c in contributions]
    results, _ = summed(codec, contributions, pieces, [{}, {}, {}], 9)
    expected = torch.stack([own.double() for _, own in results]).sum(dim=0)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-4
    for (total, own), original, kept in zip(results, contributions, before, strict=True):
        assert total.dtype == own.dtype == dtype
        assert total.shape == own.shape == (num_values,)
        assert torch.equal(total, results[0][0])
        assert torch.equal(original, kept)
        torch.testing.assert_close(total.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", [name for name, codec in CODECS.items() if codec.linear])
def test_a_projections_bytes_are_known_without_values(name: str) -> None:
    codec, pieces = make(name), [Piece(0, torch.Size([64, 48])), Piece(3072, torch.Size([28]))]
    _, real = summed(codec, [gaussian(3100)], pieces, [{}], 1)
    _, foretold = summed(codec, [gaussian(3100).to("meta")], pieces, [{}], 1)
    assert real == foretold > 0


def test_powersgd_is_exact_up_to_its_rank_and_sends_the_rest_as_it_is() -> None:
    shapes = [(40, 30), (64,), (40, 3, 10), (30, 64), (4, 4), (40, 30)]
    codec = PowerSgdCodec(PowerSgdConfig(rank=3))
    pieces, parts, offset = [], [], 5  # a gap before each piece
    for index, shape in enumerate(shapes):
        size = math.prod(shape)
        pieces.append(Piece(offset, torch.Size(shape)))
        low = gaussian(shape[0], 3, seed=index) @ gaussian(3, size // shape[0], seed=index + 50)
        parts.append(torch.nn.functional.pad((low if len(shape) > 1 else gaussian(*shape)).reshape(-1), (5, 0)))
        offset += size + 5
    flat = torch.cat(parts)
    [(total, own)], num_bytes = summed(codec, [flat], pieces, [{}], 1)
    torch.testing.assert_close(total, flat, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(own, flat, rtol=1e-4, atol=1e-4)
    assert torch.equal(total[1205:1279], flat[1205:1279])
    assert num_bytes == 4 * (3 * (70 + 70 + 94 + 70) + 64 + 16 + 6 * 5)


def test_powersgds_memory_turns_to_the_largest_directions() -> None:
    u, v = torch.linalg.qr(gaussian(60, 20))[0], torch.linalg.qr(gaussian(50, 20))[0]
    strengths = torch.tensor([10.0, 9, 8, 7] + [1.0] * 16)
    matrix = (u * strengths) @ v.T
    best = (strengths[4:].square().sum()).sqrt()
    codec, memory, errors = PowerSgdCodec(PowerSgdConfig(rank=4)), {}, []
    for step in range(6):
        [(total, _)], _ = summed(codec, [matrix.reshape(-1)], [Piece(0, matrix.shape)], [memory], step)
        errors.append(float((total.view_as(matrix) - matrix).norm() / best))
    assert errors[0] > errors[1] > errors[2]
    assert errors[-1] < 1.001


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_powersgd_neither_fails_nor_hides_what_is_not_finite(bad: float) -> None:
    matrix = gaussian(40, 30)
    matrix[3, 4] = bad
    codec = PowerSgdCodec(PowerSgdConfig())
    [(total, _)], _ = summed(codec, [matrix.reshape(-1)], [Piece(0, matrix.shape)], [{}], 1)
    assert not total.isfinite().all()


REFUSED = {
    "int8": "chunk = 12",
    "int4": "chunk = 0",
    "topk": "ratio = 0.0",
    "randomk": "ratio = 1.5",
    "qsgd": "levels = 128",
    "powersgd": "rank = 0",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_setting_out_of_bounds_is_refused(kind: str) -> None:
    with pytest.raises(UsageError, match=REFUSED[kind].split()[0]):
        parse_plan(f'[codec]\nkind = "{kind}"\n{REFUSED[kind]}\n', origin="test")
