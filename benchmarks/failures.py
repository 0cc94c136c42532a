"""What failures cost: Shoal's elastic ranks on emulated nodes, beside torchrun's restarts and torchft (needs root).

    python benchmarks/failures.py --part kill,freeze,join,coordinator,resume,torchrun,torchft,soak [--tries 10]

Four nodes with links of 1 Gbit; each try is a run of its own. Parts: `kill` (-9 of one worker), `freeze` (SIGSTOP, and
a link cut), `join` (a fifth node, 25 M parameters), `coordinator` (killed), `resume` (everything killed at once), the
rivals under `kill`, and `soak` (`--soak N` random faults in one run). Each part writes
`benchmarks/results/failures_PART.json`. `--toy` trains a tiny model, to try the script itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import failures_rivals as rivals
from failures_reading import absence, fault_of, interruption, joining, plain, returned_s
from failures_shoal import NODES, Task, killed_and_resumed, rehearse
from failures_soak import Soak, soak
from harness import spread, store, table
from step_time import MODELS

MODELS = {**MODELS, "toy": ["layers=2", "dim=64"]}
FAULT_AT, AFTER = 30, 40  # steps
LIMIT_S = 120.0
Figures = list[dict[str, Any]]


def kill(options: argparse.Namespace) -> Figures:
    """kill -9 of one of four workers, another one each time."""
    return [_struck(options, "kill", number % NODES, {}) for number in range(options.tries or 10)]


def freeze(options: argparse.Namespace) -> Figures:
    """SIGSTOP of a worker and the cut of a link, in turn; both end after two leases."""
    found = []
    for number in range(options.tries or 5):
        for kind in ("freeze", "cut"):
            found.append(_struck(options, kind, number % NODES, {"seconds": 2 * options.lease}))
    return found


def join(options: argparse.Namespace) -> Figures:
    """A fifth worker comes while four train."""
    task = replace(_task(options, "25M"), max_nodes=NODES + 1, batch=options.join_batch)
    fault_at, after = (10, 40) if not options.toy else (FAULT_AT, 400)
    found = []
    for _ in range(options.tries or 5):
        found.append(plain(joining(rehearse(task, fault_at + after, {"kind": "join", "step": fault_at}))))
        _say("join", found[-1])
    return found


def coordinator(options: argparse.Namespace) -> Figures:
    """The coordinator is killed; its launcher starts it again."""
    found = []
    for _ in range(options.tries or 5):
        steps = FAULT_AT + (3 * AFTER if not options.toy else 10 * AFTER)
        events = rehearse(_task(options, "3M"), steps, {"kind": "kill_coordinator", "step": FAULT_AT})
        figure = plain(absence(events))
        figure["beyond_s"] = figure["longest_s"] - figure["normal_s"]
        found.append(figure)
        _say("coordinator", figure)
    return found


def resume(options: argparse.Namespace) -> Figures:
    """All processes are killed at once, and the run is resumed."""
    found = []
    for number in range(options.tries or 3):
        task = replace(_task(options, "3M"), checkpoint_every=10, seed=number)
        found.append(killed_and_resumed(task, 60, 35))
        _say("resume", found[-1])
    return found


def torchrun(options: argparse.Namespace) -> Figures:
    """DistributedDataParallel with snapshots: as it comes, and with a store for each rendezvous."""
    ways = [rivals.torchrun(options.snapshot_every, own_store=own_store) for own_store in (False, True)]
    return _rival_tries(options, ways)


def torchft(options: argparse.Namespace) -> Figures:
    """torchft as its README has it, and with a short patience of its lighthouse."""
    why = rivals.why_no_torchft()
    if why is not None:
        return [{"system": "torchft", "came_back": False, "error": f"cannot run here: {why}"}]
    short = ("--heartbeat_timeout_ms", str(round(1000 * options.lease)))
    ways = [rivals.torchft(ddp=True), rivals.torchft(ddp=False), rivals.torchft(*short, ddp=False)]
    return _rival_tries(options, ways)


def soaked(options: argparse.Namespace) -> Figures:
    """Many random faults."""
    every = tuple(options.every_steps)
    lease_s = min(2.0, options.lease)
    wanted = Soak(
        faults=options.soak or 50, seed=options.seed, every_steps=every, lease_s=lease_s, calm=options.soak_calm
    )
    return [soak(wanted)]


def _struck(options: argparse.Namespace, kind: str, rank: int, more: dict[str, Any]) -> dict[str, Any]:
    """One fault of one rank, and what it cost the others."""
    steps = FAULT_AT + AFTER * (10 if options.toy and more else 1)
    events = rehearse(_task(options, "3M"), steps, {"kind": kind, "step": FAULT_AT, "rank": rank, **more})
    t, source = fault_of(events, kind)["t"], f"rank-{rank}"
    found = interruption(events, t, source)
    figure = {"kind": kind, "rank": rank, **(plain(found) if found else {"came_back": False})}
    ended = [e["t"] for e in events if e["kind"] == "fault_ended"]
    figure["struck_back_s"] = returned_s(events, ended[0], source) if ended else None
    _say(kind, figure)
    return figure


def _rival_tries(options: argparse.Namespace, ways: Sequence[rivals.Rival]) -> Figures:
    """All rivals in turn, as often as asked for."""
    found = []
    for number in range(options.tries or 5):
        for rival in ways:
            # Half way between two snapshots, as failures fall on the average.
            kill_at = 2 * options.snapshot_every + options.snapshot_every // 2
            figure = rivals.killed(rival, _task(options, "3M"), kill_at, number % NODES, options.limit)
            found.append({"system": rival.name, "rank": number % NODES, **figure})
            _say(rival.name, figure)
    return found


def _task(options: argparse.Namespace, model: str) -> Task:
    arguments = MODELS["toy" if options.toy else options.model or model]
    return Task(arguments=tuple(arguments), batch=options.batch, link=options.link, lease_s=options.lease)


def _say(name: str, figure: dict[str, Any]) -> None:
    short = {key: _short(value) for key, value in figure.items()}
    print(f"{name}: {', '.join(f'{key} {value}' for key, value in short.items())}", flush=True)


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list) and value and isinstance(value[0], float):
        return spread(value)
    return value


def _column(figures: Figures, name: str) -> str:
    """A figure over all tries that have it."""
    values = [value for figure in figures if (value := figure.get(name)) is not None]
    return spread([float(v) for value in values for v in (value if isinstance(value, list) else [value])] or [0.0])


def summary(part: str, figures: Figures) -> str:
    """The part's table: a row for each system or kind, a column for each figure, median and range over tries."""
    rows = []
    names = list(dict.fromkeys(name for figure in figures for name in figure if _is_figure(name, figure[name])))
    for name in dict.fromkeys(_name(part, figure) for figure in figures):
        own = [figure for figure in figures if _name(part, figure) == name]
        back = [figure for figure in own if figure.get("came_back", True)]
        columns = [_column(back, column) if back else "" for column in names]
        rows.append([name, f"{len(back)} of {len(own)}", *columns])
    return table(["", "tries", *names], rows)


def _name(part: str, figure: dict[str, Any]) -> str:
    return str(figure.get("system") or figure.get("kind") or part)


def _is_figure(name: str, value: Any) -> bool:
    if name in ("rank", "seed"):
        return False
    if isinstance(value, list):
        return bool(value) and all(isinstance(v, int | float) for v in value)
    return isinstance(value, int | float) and not isinstance(value, bool)


def main() -> None:
    """Run the parts asked for."""
    parts: dict[str, Callable[[argparse.Namespace], Figures]] = {
        "kill": kill,
        "freeze": freeze,
        "join": join,
        "coordinator": coordinator,
        "resume": resume,
        "torchrun": torchrun,
        "torchft": torchft,
        "soak": soaked,
    }
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", help=f"of {', '.join(parts)}; default: all, or soak where only --soak is given")
    parser.add_argument("--tries", type=int, help="of each part; default: 10 kills, 5 of the others, 3 resumptions")
    parser.add_argument("--soak", type=int, help="random faults in the soak; default: 50")
    parser.add_argument("--model", choices=sorted(MODELS), help="default: 25M to join, else 3M")
    parser.add_argument("--toy", action="store_true", help="a tiny model, to try the script itself")
    parser.add_argument("--batch", type=int, default=8, help="samples of a step over all ranks")
    parser.add_argument("--join-batch", type=int, default=5)
    parser.add_argument("--link", default="1000mbit")
    parser.add_argument("--lease", type=float, default=3.0, help="seconds after which a silent worker is lost")
    parser.add_argument("--snapshot-every", type=int, default=20, help="steps between snapshots under torchrun")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds that a rival may take to come back")
    parser.add_argument(
        "--every-steps", type=int, nargs=2, default=(20, 80), help="from one fault of the soak to the next"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the soak")
    parser.add_argument("--soak-calm", type=int, default=2, help="runs as long as the soak, without faults")
    options = parser.parse_args()
    chosen = options.part or ("soak" if options.soak else ",".join(parts))
    for part in chosen.split(","):
        if part not in parts:
            parser.error(f"--part got {part!r}, expected of {', '.join(parts)}")
    if options.batch % NODES:
        parser.error(f"--batch got {options.batch}, expected a multiple of {NODES}: rivals weigh all ranks alike")
    for part in chosen.split(","):
        figures = parts[part](options)
        print(summary(part, figures))
        print(store(f"failures_{part}", figures), flush=True)


if __name__ == "__main__":
    main()
