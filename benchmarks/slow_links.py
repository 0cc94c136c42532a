"""Training over slow links, beside stock DistributedDataParallel: four emulated nodes; needs root.

    python benchmarks/slow_links.py --part throughput [--plans streaming] [--links 100mbit,10mbit] [--rounds 3]
    python benchmarks/slow_links.py --part learning [--plans streaming] [--links 100mbit] [--steps 300]
    python benchmarks/slow_links.py --part codecs [--plans int8,powersgd,topk,onebit] [--links 100mbit] [--steps 300]
    python benchmarks/slow_links.py --part pictures --docs

throughput: samples a second of each plan and of DDP on each link, against the same on links without a limit; in each
round all of them run one after the other. "Of median step" shows the usual step; the rate counts the steps that wait
for an exchange as well. learning and codecs: all start from the same weights, see the same samples in the same order
and the same validation windows, and clip at norm 1. In learning, a plan that ends above DDP's loss is run again for
`--more` times the steps, to see when it gets there. codecs also times each plan beside DDP in alternating runs: all
steps count, those for Adam's second moment included, but not the codec's warm-up, which is cut to 4 steps there.

A plan is a name under plans/ or a path. Its batch, clipping, threads, validation and limits are the benchmark's.
Figures go to benchmarks/results/ after every training, pictures too; with --docs pictures also go to docs/pictures/.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import loss_pictures
from harness import RESULTS, spread, store, table
from record import Point, Record, Task, train_ddp, train_shoal
from shoal.plan import Plan, load_plan

ROOT = Path(__file__).parents[1]
NODES = 4
DDP = "DDP"
UNLIMITED = "none"
PLANS = {"throughput": "streaming", "learning": "streaming", "codecs": "int8,powersgd,topk,onebit"}
LINKS = {"throughput": "100mbit,10mbit", "learning": "100mbit", "codecs": "100mbit"}
STEPS = {"learning": 300, "codecs": 300}
RATE_STEPS = {"throughput": 120, "codecs": 72}
RATED_WARM_UP = 4


def find_plan(name: str) -> Plan:
    """A plan by its path, or by its name under plans/."""
    return load_plan(Path(name) if name.endswith(".toml") else ROOT / "plans" / f"{name}.toml")


def lab_of(link: str) -> str:
    """The lab's description."""
    return f"nodes={NODES}" if link == UNLIMITED else f"nodes={NODES},link={link}"


def train(name: str, task: Task, link: str, plan: Plan | None = None) -> Record:
    """Train by a plan, or by DDP where `name` says so, and tell in a line what came out."""
    plan = plan or (None if name == DDP else find_plan(name))
    record = train_shoal(plan, task, lab_of(link)) if plan else train_ddp(task, lab_of(link))
    took = record.ends[0][-1] - record.ends[0][0] + record.step_s[0][0]
    loss = f", validation loss {record.validations[-1].loss:.4f}" if record.validations else ""
    print(f"{name} on {link}: {record.num_steps} steps in {took:.1f} s{loss}", flush=True)
    return record


# Learning and codecs may ask for the same base line.
train_once = functools.cache(train)


# -- throughput --------------------------------------------------------------------------------------------------------


def measure_rates(options: argparse.Namespace, part: str, plans: Sequence[str], links: Sequence[str]) -> dict[str, Any]:
    """Rounds of short trainings without validation: "PLAN LINK" -> one set of figures a round."""
    figures: dict[str, Any] = {}
    steps = RATE_STEPS[part]
    if options.steps is not None:
        steps = options.steps if part == "throughput" else min(options.steps, steps)
    rated = {name: _short_warm_up(find_plan(name)) for name in plans}
    for number in range(options.rounds):
        names = [DDP, *plans] if number % 2 == 0 else [*plans, DDP]
        for link in links:
            for name in names:
                task = _task(options, min(steps, options.ddp_steps) if name == DDP else steps)
                record = train(name, task, link, rated.get(name))
                warm_up = min(options.ddp_warm_up if name == DDP else options.warm_up, record.num_steps // 2)
                figures.setdefault(f"{name} {link}", []).append(_speeds(record, warm_up))
                store(f"slow_links_{part}_rates", figures)
    return figures


def _short_warm_up(plan: Plan) -> Plan:
    codec = plan.codec
    return dataclasses.replace(
        plan, codec=dataclasses.replace(codec, warmup_steps=min(codec.warmup_steps, RATED_WARM_UP))
    )


def _speeds(record: Record, warm_up: int) -> dict[str, Any]:
    return {
        "rate": record.rate(warm_up),
        "batch": sum(shares[-1] for shares in record.shares),
        "median_rate": record.median_rate(warm_up),
        "step_s": record.step_seconds(warm_up),
        "megabytes_per_step": record.megabytes_per_step,
        "interface_megabytes_per_step": record.interface_megabytes / record.num_steps,
        "rhythm": record.rhythm,
        "steps": record.num_steps,
        "warm_up": warm_up,
    }


def throughput(options: argparse.Namespace) -> None:
    """Part a."""
    plans, links = _names(options, "throughput")
    figures = measure_rates(options, "throughput", plans, [UNLIMITED, *links])
    header = ["system", "link", "H", "MB a step", "samples/s", "of unlimited", "of median step", "times DDP", "note"]
    rows = [_rate_row(figures, name, link) for link in [UNLIMITED, *links] for name in [DDP, *plans]]
    print(table(header, rows))


def _rate_row(figures: dict[str, Any], name: str, link: str) -> list[str]:
    rounds, free = figures[f"{name} {link}"], figures[f"{name} {UNLIMITED}"]
    base = figures[f"{DDP} {link}"]
    kept = {key: [a[key] / b[key] for a, b in zip(rounds, free, strict=True)] for key in ("rate", "median_rate")}
    over = [a["rate"] / b["rate"] for a, b in zip(rounds, base, strict=True)]
    return [
        Path(name).stem,
        link,
        _rhythms(rounds),
        f"{statistics.median(r['megabytes_per_step'] for r in rounds):.2f}",
        spread([r["rate"] for r in rounds]),
        spread(kept["rate"]),
        spread(kept["median_rate"]),
        spread(over),
        "too few steps for this H" if any(_too_short(r) for r in rounds) else "",
    ]


def _rhythms(rounds: list[dict[str, Any]]) -> str:
    return ", ".join(sorted({str(r["rhythm"]) for r in rounds if r["rhythm"]}))


def _too_short(speeds: dict[str, Any]) -> bool:
    """Whether fewer than two whole rounds of exchanges lie in what was measured."""
    return bool(speeds["rhythm"]) and speeds["steps"] - speeds["warm_up"] < 2 * speeds["rhythm"]


# -- learning ----------------------------------------------------------------------------------------------------------


def learn(options: argparse.Namespace, part: str) -> dict[str, Any]:
    """Long trainings with validation: "PLAN LINK" -> the record; "PLAN LINK longer" where a plan had to go on."""
    plans, links = _names(options, part)
    steps = options.steps or STEPS[part]
    task = dataclasses.replace(_task(options, steps), validate_every=options.validate_every)
    figures: dict[str, Any] = {}

    def keep(key: str, record: Record) -> None:
        figures[key] = record.plain()
        store(f"slow_links_{part}", figures)

    for link in links:
        base = train_once(DDP, task, link)
        keep(f"{DDP} {link}", base)
        goal = base.validations[-1].loss
        for name in plans:
            record = train_once(name, task, link)
            keep(f"{name} {link}", record)
            if part == "learning" and record.seconds_to(goal) is None and options.more > 1:
                longer = dataclasses.replace(task, steps=round(options.more * steps))
                keep(f"{name} {link} longer", train_once(name, longer, link))
        print(table(_LEARNING, [_learning_row(figures, name, link, options) for name in [DDP, *plans]]), flush=True)
    return figures


_LEARNING = [
    *("system", "link", "H", "steps", "MB sent", "MB: DDP / it", "s", "s: DDP / it", "validation loss"),
    *("loss: it / DDP", "s to DDP's loss", "s to it: DDP / it"),
]


def _learning_row(figures: dict[str, Any], name: str, link: str, options: argparse.Namespace) -> list[str]:
    own, base = figures[f"{name} {link}"], figures[f"{DDP} {link}"]
    end, goal = Point(*own["validations"][-1]), Point(*base["validations"][-1])
    reached = _seconds_to(own, goal.loss)
    note = ""
    if reached is None and f"{name} {link} longer" in figures:
        reached, note = (
            _seconds_to(figures[f"{name} {link} longer"], goal.loss),
            f", up to {options.more:g} x the steps",
        )
    return [
        Path(name).stem,
        link,
        str(own["rhythm"] or ""),
        str(end.step),
        f"{end.megabytes:.1f}",
        f"{goal.megabytes / end.megabytes:.2f}" if end.megabytes else "",
        f"{end.seconds:.0f}",
        f"{goal.seconds / end.seconds:.2f}",
        f"{end.loss:.4f}",
        f"{end.loss / goal.loss:.4f}",
        f"{reached:.0f}{note}" if reached is not None else f"not reached{note}",
        f"{goal.seconds / reached:.2f}" if reached is not None else "",
    ]


def _seconds_to(plain: dict[str, Any], loss: float) -> float | None:
    return next((point.seconds for point in (Point(*p) for p in plain["validations"]) if point.loss <= loss), None)


def learning(options: argparse.Namespace) -> None:
    """Part b."""
    learn(options, "learning")
    pictures(options, ["learning"])


def codecs(options: argparse.Namespace) -> None:
    """Part c."""
    plans, links = _names(options, "codecs")
    rates = measure_rates(options, "codecs", plans, links)
    rows = [_codec_row(rates, name, link) for link in links for name in [DDP, *plans]]
    print(table(["system", "link", "MB a step", "steps/s", "times DDP"], rows), flush=True)
    learn(options, "codecs")
    pictures(options, ["codecs"])


def _codec_row(figures: dict[str, Any], name: str, link: str) -> list[str]:
    rounds, base = figures[f"{name} {link}"], figures[f"{DDP} {link}"]
    return [
        Path(name).stem,
        link,
        f"{statistics.median(r['megabytes_per_step'] for r in rounds):.2f}",
        spread([r["rate"] / r["batch"] for r in rounds]),
        spread([r["rate"] / b["rate"] for r, b in zip(rounds, base, strict=True)]),
    ]


# -- pictures and options ----------------------------------------------------------------------------------------------


def pictures(options: argparse.Namespace, parts: Sequence[str] = ("learning", "codecs")) -> None:
    """Draw what is stored: one picture a link, loss over seconds and loss over megabytes."""
    folders = [RESULTS, *([ROOT / "docs" / "pictures"] if options.docs else [])]
    for part in parts:
        path = RESULTS / f"slow_links_{part}.json"
        if not path.exists():
            print(f"no {path} to draw from")
            continue
        figures: dict[str, Any] = json.loads(path.read_text())["figures"]
        for link in dict.fromkeys(key.split()[1] for key in figures):
            curves = {
                Path(key.split()[0]).stem: [Point(*p) for p in figures[key]["validations"]]
                for key in figures
                if key.split()[1:] == [link]
            }
            title = f"{NODES} nodes with links of {link}, the same samples for all"
            for drawn in loss_pictures.write(f"slow-links-{part}-{link}", title, curves, folders):
                print(drawn)


def _task(options: argparse.Namespace, steps: int) -> Task:
    return Task(
        model=options.model,
        batch=options.batch,
        seed=options.seed,
        steps=steps,
        validation_samples=options.validation_samples,
    )


def _names(options: argparse.Namespace, part: str) -> tuple[list[str], list[str]]:
    return (options.plans or PLANS[part]).split(","), (options.links or LINKS[part]).split(",")


def main() -> None:
    """Run the parts asked for."""
    parts = {"throughput": throughput, "learning": learning, "codecs": codecs, "pictures": pictures}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", default="throughput,learning,codecs", help=f"of {', '.join(parts)}")
    parser.add_argument("--plans", help="names under plans/ or paths; default: each part's own")
    parser.add_argument("--links", help=f"such as 100mbit,10mbit, or {UNLIMITED}; default: each part's own")
    parser.add_argument("--steps", type=int, help="of a training; default: 120 for throughput, else 300")
    parser.add_argument("--model", default="3M")
    parser.add_argument("--batch", type=int, default=8, help="samples of a step over all ranks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3, help="of throughput, and of the codecs' timing")
    parser.add_argument("--warm-up", type=int, default=24, help="steps that do not count for a plan's throughput")
    parser.add_argument("--ddp-steps", type=int, default=10, help="of DDP where only its throughput is measured")
    parser.add_argument("--ddp-warm-up", type=int, default=2)
    parser.add_argument("--validate-every", type=int, default=25)
    parser.add_argument("--validation-samples", type=int, default=256)
    parser.add_argument(
        "--more", type=float, default=1.5, help="times the steps, for a plan that ends above DDP's loss"
    )
    parser.add_argument("--docs", action="store_true", help="put pictures into docs/pictures, too")
    options = parser.parse_args()
    for part in options.part.split(","):
        if part not in parts:
            parser.error(f"--part got {part!r}, expected of {', '.join(parts)}")
    if options.batch % NODES:
        parser.error(f"--batch got {options.batch}, expected a multiple of {NODES}: DDP weighs all ranks alike")
    for part in options.part.split(","):
        parts[part](options)


if __name__ == "__main__":
    main()
