"""A cluster with one slow node: samples a second of all ranks together, beside stock DistributedDataParallel.

    python benchmarks/stragglers.py --plans plans/gossip.toml,plans/ssp.toml [--cpu 0.4] [--slow 0.25] [--seconds 90]

Four emulated nodes with a CPU quota each, the last with a part of the others' (needs root). "Alone" is what the same
job does on one node with that node's quota, in plain PyTorch and without any exchange; the sum over the nodes is what
the cluster could do at most. Every round measures all, one after the other. Rates are those of the time in which every
rank trains, without its first steps.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from harness import spread, store, table
from record import Task, train_ddp, train_shoal
from slow_links import DDP, find_plan

ALONE = "alone, summed"


def write_cluster(folder: Path, name: str, cpus: list[float], link: str | None) -> str:
    """Write a cluster of one node for each quota; return its path."""
    lines = [f'link = "{link}"'] if link else []
    for cpu in cpus:
        lines += ["[[node]]", f"cpu = {cpu}"]
    path = folder / f"{name}.toml"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def alone(options: argparse.Namespace, folder: Path) -> list[float]:
    """What each node does by itself; nodes alike are measured once."""
    quotas = _quotas(options)
    task = Task(model=options.model, batch=options.batch // len(quotas), steps=options.alone_steps)
    rates = {
        cpu: train_ddp(task, write_cluster(folder, f"alone-{cpu}", [cpu], None)).rate(2) for cpu in sorted(set(quotas))
    }
    return [rates[cpu] for cpu in quotas]


def one_round(options: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """System -> samples a second of each rank."""
    cluster = write_cluster(folder, "cluster", _quotas(options), options.link)
    rates = {ALONE: alone(options, folder)}
    task = Task(model=options.model, batch=options.batch, steps=options.ddp_steps)
    rates[DDP] = train_ddp(task, cluster).rank_rates(2)
    for name in options.plans.split(","):
        task = Task(model=options.model, batch=options.batch, seconds=options.seconds)
        rates[name] = train_shoal(find_plan(name), task, cluster).rank_rates(options.warm_up)
    for system, each in rates.items():
        print(f"{system}: {sum(each):.2f} samples/s, ranks {' '.join(f'{rate:.2f}' for rate in each)}", flush=True)
    return rates


def _quotas(options: argparse.Namespace) -> list[float]:
    if options.parts:
        return [round(options.cpu * float(part), 4) for part in options.parts.split(",")]
    return [options.cpu] * (options.nodes - 1) + [round(options.cpu * options.slow, 4)]


def _row(rounds: list[dict[str, list[float]]], system: str) -> list[str]:
    totals = [sum(r[system]) for r in rounds]
    ranks = [statistics.median(values) for values in zip(*(r[system] for r in rounds), strict=True)]
    return [
        Path(system).stem,
        spread(totals),
        spread([total / sum(r[ALONE]) for total, r in zip(totals, rounds, strict=True)]),
        spread([total / sum(r[DDP]) for total, r in zip(totals, rounds, strict=True)]),
        " ".join(f"{rate:.2f}" for rate in ranks),
    ]


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plans", required=True, help="names under plans/ or paths")
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--cpu", type=float, default=0.4, help="cores of a node")
    parser.add_argument("--slow", type=float, default=0.25, help="the last node's part of that")
    parser.add_argument("--parts", help="each node's part of --cpu, e.g. 1,1,0.5,0.25; in place of --nodes and --slow")
    parser.add_argument("--link", help="such as 1000mbit; default: no limit")
    parser.add_argument("--model", default="3M")
    parser.add_argument("--batch", type=int, default=16, help="samples of a step over all ranks")
    parser.add_argument("--seconds", type=float, default=90.0, help="of training by each plan")
    parser.add_argument("--warm-up", type=int, default=4, help="steps of each rank that do not count")
    parser.add_argument("--ddp-steps", type=int, default=15)
    parser.add_argument("--alone-steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    options.nodes = len(_quotas(options))
    if options.batch % options.nodes:
        parser.error(f"--batch got {options.batch}, expected a multiple of {options.nodes}: all ranks take alike")
    rounds: list[dict[str, list[float]]] = []
    figures: dict[str, Any] = {"quotas": _quotas(options), "plans": options.plans, "rounds": rounds}
    with tempfile.TemporaryDirectory(prefix="shoal-cluster-") as folder:
        for _ in range(options.rounds):
            rounds.append(one_round(options, Path(folder)))
            path = store("stragglers", figures)
    header = ["system", "samples/s", "of alone, summed", "times DDP", "each rank, samples/s"]
    print(table(header, [_row(rounds, system) for system in rounds[0]]))
    print(path)


if __name__ == "__main__":
    main()
