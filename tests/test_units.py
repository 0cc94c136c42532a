"""Quantities are read as people write them, and written so that people can read them."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shoal.units import format_bytes, format_duration, format_rate, parse_rate_bits_per_s


@pytest.mark.parametrize(
    ("text", "bits_per_s"),
    [
        ("100mbit", 1e8),
        ("1gbit", 1e9),
        ("2.5 Gbit", 2.5e9),
        (" 10 KBIT ", 1e4),
        ("7bit", 7.0),
        ("0.5kbit", 500.0),
    ],
)
def test_a_rate_is_bits_per_second(text: str, bits_per_s: float) -> None:
    assert parse_rate_bits_per_s(text) == bits_per_s


@pytest.mark.parametrize(
    "text", ["", "100", "mbit", "100mb", "-1mbit", "0mbit", "0.0gbit", "1e3mbit", "1,5mbit", "inf", "10 tbit", "1.mbit"]
)
def test_what_is_not_a_positive_rate_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="expected a rate such as 100mbit") as refusal:
        parse_rate_bits_per_s(text)
    assert repr(text) in str(refusal.value)


@pytest.mark.parametrize(
    ("bits_per_s", "text"),
    [(1e8, "100 Mbit/s"), (1e9, "1 Gbit/s"), (2.5e9, "2.5 Gbit/s"), (1e3, "1 kbit/s"), (999.0, "999 bit/s")],
)
def test_a_rate_is_written_in_its_largest_unit(bits_per_s: float, text: str) -> None:
    assert format_rate(bits_per_s) == text


@given(st.sampled_from(["bit", "kbit", "mbit", "gbit"]), st.integers(1, 999))
def test_a_written_rate_reads_back(unit: str, amount: int) -> None:
    rate = parse_rate_bits_per_s(f"{amount}{unit}")
    assert parse_rate_bits_per_s(format_rate(rate).removesuffix("/s")) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 B"), (1, "1 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (2**20, "1.0 MiB")],
)
def test_bytes_are_written_in_binary_units(size_bytes: int, text: str) -> None:
    assert format_bytes(size_bytes) == text


def test_the_largest_unit_takes_what_is_left() -> None:
    assert format_bytes(5 * 2**50) == "5120.0 TiB"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (0.0123, "12.3 ms"),
        (1, "1.0 s"),
        (59.9, "59.9 s"),
        (60, "1 min 00 s"),
        (75, "1 min 15 s"),
        (3599.6, "1 h 00 min"),
        (7260, "2 h 01 min"),
        (100 * 3600, "100 h 00 min"),
    ],
)
def test_a_duration_has_at_most_two_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@given(st.floats(1e-3, 1e9))
@example(0.9995)
@example(0.9999999)
def test_a_duration_is_never_written_with_an_exponent(seconds: float) -> None:
    assert "e" not in format_duration(seconds)
