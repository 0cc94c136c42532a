"""What a checkpoint costs the training step.

    python benchmarks/checkpoint_stall.py [--models 3M,25M] [--ranks 4] [--steps 60]

Runs `shoal.train` itself, with a checkpoint every few steps, and reads the run's event log: how long the training
thread stood still for each checkpoint (its stall), and how much longer the step took during which the copy was made
than the steps around it (which also counts the cores that copying takes from computing).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import shoal
from harness import spread, store, table
from shoal.events import Event, read_events
from shoal.job.target import resolve
from shoal.plan import parse_plan
from step_time import EXAMPLE, MODELS

EVERY = 12


def figures_of(events: list[Event]) -> dict[str, list[float]]:
    """Per checkpoint: stall and step time in ms, and the step's time over its neighbours'."""
    steps = {int(e["step"]): float(e["step_s"]) for e in events if e["kind"] == "step" and e["source"] == "rank-0"}
    saved = [e for e in events if e["kind"] == "checkpoint_saved" and int(e["step"]) + 1 in steps]
    typical = statistics.median(steps.values())
    around = {
        int(e["step"]): statistics.median(
            [steps[s] for s in range(int(e["step"]) - 1, int(e["step"]) + EVERY) if s in steps and s != e["step"] + 1]
        )
        for e in saved
    }
    return {
        "stall_ms": [float(e["stall_s"]) * 1e3 for e in saved],
        "stall_share": [float(e["stall_s"]) / typical for e in saved],
        "slowdown": [steps[int(e["step"]) + 1] / around[int(e["step"])] - 1 for e in saved],
        "step_ms": [typical * 1e3],
        "write_s": [float(e["write_s"]) for e in saved],
        "size_mb": [float(e["size_bytes"]) / 1e6 for e in saved],
    }


def main() -> None:
    """Train each model and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="3M,25M")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    plan = parse_plan(
        f"batch.size = {2 * options.ranks}\nvalidation.every = 0\ncheckpoint.every = {EVERY}", origin="benchmark"
    )
    rows, results = [], {}
    for model in options.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            target = resolve(f"{EXAMPLE}:job", MODELS[model])
            run = Path(folder) / "run"
            shoal.train(target, plan=plan, nodes=options.ranks, run=run, steps=options.steps)
            figures = figures_of(read_events(run / "events"))
        results[model] = figures
        percent = [f"{100 * statistics.median(figures[name]):.2f} %" for name in ("stall_share", "slowdown")]
        size = f"{figures['size_mb'][0]:.0f}"
        rows.append([model, size, spread(figures["step_ms"]), spread(figures["stall_ms"]), *percent])
    print(table(["model", "MB", "step ms", "stall ms", "stall / step", "that step / its neighbours - 1"], rows))
    print(store("checkpoint_stall", results))


if __name__ == "__main__":
    main()
