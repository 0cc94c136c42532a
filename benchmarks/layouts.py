"""Layouts beside PyTorch's own parts put together by hand; the lab needs root.

    python benchmarks/layouts.py --part hybrid [--lab nodes=2,ranks=2,link=100mbit] [--rounds 3]
    python benchmarks/layouts.py --part step [--lab nodes=1,ranks=2] [--model 25M] [--rounds 5]
    python benchmarks/layouts.py --part large [--set layers=20 --set dim=2048 --set heads=16]

hybrid: samples a second of FSDP2 inside nodes with streaming local steps between them, against FSDP2 over all ranks and
against HSDP, both by PyTorch, and against Shoal's shard axis over all ranks; one after the other in each round.
step: the median step of the shard axis against FSDP2 by hand, alternating. large: a model of a billion parameters on
four processes, a few steps; the memory of all of them together is looked at twice a second.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import psutil

from harness import spread, store, table
from record import Record, Task, train_ddp, train_shoal
from shoal.cluster.description import parse_lab
from shoal.events import read_events
from shoal.plan import Plan, load_plan
from shoal.strategy.layout.config import LayoutConfig

ROOT = Path(__file__).parents[1]
GIB = 2**30
_OWN = ("Pss_Anon", "Pss_Shmem")


def shard_plan(ranks: int) -> Plan:
    """One replica over all ranks."""
    return dataclasses.replace(Plan(), layout=LayoutConfig(replicate=1, shard=ranks))


def train(system: str, task: Task, lab: str) -> Record:
    """Train by a system."""
    ranks = parse_lab(lab).world_size
    if system == "hybrid":
        record = train_shoal(load_plan(ROOT / "plans" / "hybrid.toml"), task, lab)
    elif system == "shard":
        record = train_shoal(shard_plan(ranks), task, lab)
    else:
        record = train_ddp(task, lab, system)
    print(f"{system} on {lab}: {record.num_steps} steps, median {record.step_seconds(2) * 1e3:.0f} ms", flush=True)
    return record


def hybrid(options: argparse.Namespace) -> None:
    """Throughput across slow links."""
    lab = options.lab or "nodes=2,ranks=2,link=100mbit"
    systems = options.systems.split(",")
    rates: dict[str, list[float]] = {name: [] for name in systems}
    for number in range(options.rounds):
        for name in systems if number % 2 == 0 else systems[::-1]:
            steps = options.steps or (100 if name == "hybrid" else 10)
            task = Task(model=options.model, steps=steps, batch=options.batch)
            rates[name].append(train(name, task, lab).rate(20 if name == "hybrid" else 2))
            store("layouts_hybrid", rates)
    rows = [
        [name, spread(rates[name]), spread([h / r for h, r in zip(rates["hybrid"], rates[name], strict=True)])]
        for name in systems
    ]
    print(table(["system", "samples/s", "hybrid is so many times faster"], rows))


def step(options: argparse.Namespace) -> None:
    """The same layout by hand."""
    lab = options.lab or "nodes=1,ranks=2"
    times: dict[str, list[float]] = {"shard": [], "fsdp": []}
    for number in range(options.rounds):
        for name in ("shard", "fsdp") if number % 2 == 0 else ("fsdp", "shard"):
            task = Task(model=options.model, steps=options.steps or 30, batch=options.batch)
            times[name].append(train(name, task, lab).step_seconds(10) * 1e3)
            store("layouts_step", times)
    ratio = [a / b for a, b in zip(times["shard"], times["fsdp"], strict=True)]
    rows = [[options.model, lab, spread(times["shard"]), spread(times["fsdp"]), spread(ratio)]]
    print(table(["model", "where", "Shoal, ms", "by hand, ms", "ratio"], rows))


def large(options: argparse.Namespace) -> None:
    """A model that is never whole anywhere."""
    plan = ROOT / "plans" / "large.toml"
    settings = [word for setting in options.set for word in ("--set", setting)]
    peak = {"bytes": 0}
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            peak["bytes"] = max(peak["bytes"], _workers_memory())

    watcher = threading.Thread(target=watch)
    with tempfile.TemporaryDirectory(prefix="shoal-benchmark-", dir=ROOT) as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "shoal.cli.main", "train", f"{ROOT}/examples/charlm.py:job", "--nodes", "4"]
        command += ["--plan", str(plan), "--run", str(run), "--steps", str(options.steps or 3), *settings]
        watcher.start()
        try:
            subprocess.run(command, check=True)
        finally:
            over.set()
            watcher.join()
        events = read_events(run / "events")
    figures = _large_figures(events, peak["bytes"])
    store("layouts_large", figures)
    print(
        table(
            ["parameters", "state, GiB", "most memory, GiB", "ratio", "median step, s"], [[*map(str, figures.values())]]
        )
    )


def _workers_memory() -> int:
    """Memory of all workers that is not a file's: what they share counts once, and cached files do not count."""
    total = 0
    for process in psutil.process_iter(["cmdline"]):
        try:
            if "shoal.engine.worker" in (process.info["cmdline"] or []):
                rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
                total += sum(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith(_OWN))
        except (psutil.Error, OSError):
            continue
    return total


def _large_figures(events: list[Any], peak_bytes: int) -> dict[str, Any]:
    parameters = next(e["num_parameters"] for e in events if e["kind"] == "run_started")
    steps = [e["step_s"] for e in events if e["kind"] == "step" and e["source"] == "rank-0"]
    state_bytes = 16 * parameters  # float32: the value, its gradient, two of Adam's
    return {
        "parameters": parameters,
        "state_gib": round(state_bytes / GIB, 2),
        "peak_gib": round(peak_bytes / GIB, 2),
        "ratio": round(peak_bytes / state_bytes, 3),
        "step_s": round(statistics.median(steps), 1),
    }


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["hybrid", "step", "large"], required=True)
    parser.add_argument("--lab")
    parser.add_argument("--model", default="3M")
    parser.add_argument("--batch", type=int, default=8, help="sequences a step, over all ranks")
    parser.add_argument("--systems", default="hybrid,shard,fsdp,hsdp", help="of the part hybrid")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    options.set = options.set or ["layers=20", "dim=2048", "heads=16"]
    {"hybrid": hybrid, "step": step, "large": large}[options.part](options)


if __name__ == "__main__":
    main()
