"""Peak memory of a training over all its ranks, Shoal's beside stock DistributedDataParallel's.

    python benchmarks/memory.py [--models 3M,25M] [--ranks 2,4] [--rounds 3]

Each system runs in processes of its own, in turn. The figure is the largest sum of proportional set sizes (PSS: a page
that several processes share counts once) seen at any moment of the run. Linux only.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import psutil

from harness import run_workers, seating_of, spread, store, table
from step_time import EXAMPLE, MODELS

SYSTEMS = ("shoal", "ddp", "alone")


class Peak:
    """The largest sum of proportional set sizes seen."""

    def __init__(self) -> None:
        self.size_bytes = 0

    def __call__(self, pids: list[int]) -> None:
        """Look at the processes now."""
        try:
            total = sum(psutil.Process(pid).memory_full_info().pss for pid in pids)
        except psutil.Error:
            return  # one is just ending
        self.size_bytes = max(self.size_bytes, total)


def peak_mb(model: str, ranks: int, system: str) -> float:
    """Run one system alone and return its peak in MB."""
    peak = Peak()
    settings = {
        "job": f"{EXAMPLE}:job",
        "set": MODELS[model],
        "plan": "",
        "share": 1,
        "systems": [system],
        "rounds": 1,
        "steps": 3,
    }
    with seating_of(f"local{ranks}") as seating:
        run_workers(seating, Path(__file__).with_name("step_time_worker.py"), settings, watch=peak)
    return peak.size_bytes / 1e6


def main() -> None:
    """Run all pairs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="3M,25M")
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rows, figures = [], {}
    for model in options.models.split(","):
        for ranks in map(int, options.ranks.split(",")):
            runs = [{system: peak_mb(model, ranks, system) for system in SYSTEMS} for _ in range(options.rounds)]
            figures[f"{model} {ranks} ranks"] = runs
            ratio = statistics.median(run["shoal"] / run["ddp"] for run in runs)
            cells = [spread([run[system] for run in runs]) for system in SYSTEMS]
            rows.append([model, str(ranks), *cells, f"{ratio:.3f}"])
    print(table(["model", "ranks", "Shoal MB", "DDP MB", "alone MB", "Shoal/DDP"], rows))
    print(store("memory", figures))


if __name__ == "__main__":
    main()
