"""Quantities as people write them, to and from plain numbers.

Rates are bits per second on the way in (`100mbit`, as `tc` and network cards count), sizes are bytes.
"""

from __future__ import annotations

import re

_RATE_FACTOR = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_RATE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(bit|kbit|mbit|gbit)\s*", re.IGNORECASE)


def parse_rate_bits_per_s(text: str) -> float:
    """Turn `100mbit`, `1gbit` or `2.5 Gbit` into bits per second.

    Raises:
        ValueError: `text` is not a positive number followed by bit, kbit, mbit or gbit.
    """
    match = _RATE.fullmatch(text)
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"got {text!r}, expected a rate such as 100mbit or 1gbit")
    return float(match[1]) * _RATE_FACTOR[match[2].lower()]


def format_rate(bits_per_s: float) -> str:
    """`100000000.0` -> `100 Mbit/s`."""
    for unit, factor in (("Gbit/s", 1e9), ("Mbit/s", 1e6), ("kbit/s", 1e3)):
        if bits_per_s >= factor:
            return f"{bits_per_s / factor:.4g} {unit}"
    return f"{bits_per_s:.4g} bit/s"


def format_bytes(size_bytes: float) -> str:
    """`1536` -> `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size_bytes < 1024 or unit == "TiB":
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    raise AssertionError("unreachable")


def format_duration(seconds: float) -> str:
    """`0.0123` -> `12.3 ms`; `75` -> `1 min 15 s`; `7260` -> `2 h 01 min`."""
    if seconds < 0.9995:  # beyond, three digits of milliseconds round up to a whole second
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
