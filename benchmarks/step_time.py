"""Step time of all-reduce against stock DistributedDataParallel, on one machine and on emulated networks.

    python benchmarks/step_time.py [--models 3M,25M] [--where local2,local4,lab4:100mbit,lab4:1000mbit] [--rounds 5]

Every worker trains the same model three ways in turn, in blocks of a few steps: with Shoal, with DDP as it comes, and
alone (no exchange), so that each ratio is taken within one process and one minute. "Communication" is what a step takes
beyond the step alone. Bytes are counted at the network interface. The lab needs root.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from harness import run_workers, seating_of, spread, store, table

MODELS = {"3M": ["layers=4", "dim=256"], "25M": ["layers=8", "dim=512"]}
EXAMPLE = Path(__file__).parents[1] / "examples" / "charlm.py"


def run(model: str, where: str, rounds: int, steps: int, plan: str) -> list[dict[str, tuple[float, float]]]:
    """The figures of every round: system -> (seconds a step, bytes sent by rank 0 a step)."""
    systems = ["shoal", "ddp", "alone"] + (["shoal-bf16"] if where.startswith("lab") else [])
    settings: dict[str, Any] = {
        "job": f"{EXAMPLE}:job",
        "set": MODELS[model],
        "plan": plan,
        "share": 1,
        "systems": systems,
        "rounds": rounds,
        "steps": steps,
    }
    with seating_of(where) as seating:
        figures: list[dict[str, tuple[float, float]]] = run_workers(
            seating, Path(__file__).with_name("step_time_worker.py"), settings
        )
    return figures


def row(model: str, where: str, rounds: list[dict[str, tuple[float, float]]]) -> list[str]:
    """One line of the table."""
    times = {name: [r[name][0] * 1e3 for r in rounds] for name in rounds[0]}
    ratio = [a / b for a, b in zip(times["shoal"], times["ddp"], strict=True)]
    alone = statistics.median(times["alone"])
    shoal, ddp = (statistics.median(times[name]) - alone for name in ("shoal", "ddp"))
    sent = {name: statistics.median(r[name][1] for r in rounds) / 1e6 for name in times}
    half = f"{sent['shoal-bf16'] / sent['shoal']:.3f}" if "shoal-bf16" in sent else ""
    bf16 = f"{statistics.median(times['shoal-bf16']):.0f}" if "shoal-bf16" in times else ""
    return [
        model,
        where,
        *(spread(times[name]) for name in ("shoal", "ddp", "alone")),
        spread(ratio),
        f"{shoal:.1f} / {ddp:.1f} = {shoal / ddp:.2f}",
        f"{sent['shoal']:.2f} / {sent['ddp']:.2f}",
        bf16,
        half,
    ]


def main() -> None:
    """Run all pairs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="3M,25M")
    parser.add_argument("--where", default="local2,local4,lab4:100mbit,lab4:1000mbit")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--plan", default="", help="TOML text of a plan for Shoal's side")
    options = parser.parse_args()
    header = ["model", "where", "Shoal ms", "DDP ms", "alone ms", "Shoal/DDP", "communication ms", "MB sent", "bf16 ms"]
    rows, figures = [], {}
    for where in options.where.split(","):
        for model in options.models.split(","):
            rounds = run(model, where, options.rounds, options.steps, options.plan)
            figures[f"{model} {where}"] = rounds
            rows.append(row(model, where, rounds))
            print(table([*header, "bf16 bytes"], rows[-1:]), flush=True)
    print(table([*header, "bf16 bytes"], rows))
    print(store("step_time", figures))


if __name__ == "__main__":
    main()
