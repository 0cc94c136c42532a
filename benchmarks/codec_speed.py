"""How fast each codec encodes and decodes, on one thread.

    python benchmarks/codec_speed.py [--values 3200000] [--rows 4] [--rounds 15] [--only int8,topk]

Values are standard normal, fp32, cut into rows as an all-reduce over so many ranks cuts them; the figures are medians
over rounds for all rows. `with feedback` is a whole encoding by `Coder`: the residual added, the values encoded, what
is decoded taken off. `project` is one rank's part of a linear codec's rounds over a matrix of 512 columns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from harness import store, table
from shoal.plan import parse_plan
from shoal.strategy.bucket import Piece
from shoal.strategy.codec import CODECS, make_codec
from shoal.strategy.codec.feedback import Coder


def median_ms(action: Callable[[], Any], rounds: int) -> float:
    """The median time of `action`, after two runs to warm up."""
    times = []
    for _ in range(rounds + 2):
        begin = time.perf_counter()
        action()
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times[2:])


def measure(kind: str, num_values: int, num_rows: int, rounds: int) -> dict[str, float]:
    """One codec's figures with its default settings."""
    config = parse_plan(f'codec.kind = "{kind}"', origin="benchmark").codec
    codec: Any = make_codec(config)
    coder = Coder(codec, config)
    length = num_values // num_rows
    rows = torch.randn(num_rows, length, generator=torch.Generator().manual_seed(0))
    payload = codec.encode(rows, 0)
    coder.begin("bucket")
    coder.begin("flat")
    figures = {
        "bytes_a_value": payload.numel() / rows.numel(),
        "encode_ms": median_ms(lambda: codec.encode(rows, 0), rounds),
        "decode_ms": median_ms(lambda: codec.decode(payload, length, rows), rounds),
        "with_feedback_ms": median_ms(lambda: coder.encode("bucket", rows), rounds),
    }
    if codec.linear:
        flat = rows.flatten()
        pieces = [Piece(0, torch.Size([flat.numel() // 512, 512]))]
        figures["project_ms"] = median_ms(lambda: list(coder.project("flat", flat, pieces)), rounds)
    figures["encode_mb_per_s"] = rows.nbytes / 1e3 / figures["encode_ms"]
    figures["decode_mb_per_s"] = rows.nbytes / 1e3 / figures["decode_ms"]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--values", type=int, default=3_200_000)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--only", default="", help="kinds, separated by commas; default: all, and the figures are stored"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    kinds = options.only.split(",") if options.only else list(CODECS)
    figures = {kind: measure(kind, options.values, options.rows, options.rounds) for kind in kinds}
    columns = ["bytes_a_value", "encode_ms", "with_feedback_ms", "decode_ms", "project_ms", "encode_mb_per_s"]
    rows = [[kind, *(f"{f[c]:.4g}" if c in f else "" for c in columns)] for kind, f in figures.items()]
    print(table(["codec", *(c.replace("_", " ") for c in columns)], rows))
    if not options.only:
        print(store("codec_speed", {"values": options.values, "rows": options.rows, "codecs": figures}))


if __name__ == "__main__":
    main()
