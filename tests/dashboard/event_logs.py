"""Synthetic event logs, as the processes of a run would have written them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from shoal.events import Event
from shoal.run import Run

STEP_S = 0.1


def event(t: float, source: str, kind: str, **fields: Any) -> Event:
    """One event of `source` at `t` Unix seconds."""
    return {"t": t, "source": source, "kind": kind, **fields}


def started(t: float, rank: int, world_size: int, **fields: Any) -> Event:
    """The start of one rank."""
    return event(
        t,
        f"rank-{rank}",
        "run_started",
        plan_hash="3f9a0c1d",
        job="charlm.py:job",
        arguments={"layers": 4},
        world_size=world_size,
        node=f"node-{rank}",
        device="cpu",
        num_parameters=1_234_567,
        steps_per_epoch=100,
        torch="2.13.0",
        shoal="0.1.0",
        **{"stop": {"steps": 400, "epochs": None, "seconds": None, "until": None, "patience": None}, **fields},
    )


def step(t: float, rank: int, number: int, **fields: Any) -> Event:
    """One step of one rank that took STEP_S and sent 1000 bytes; 64 samples over all ranks."""
    return event(
        t,
        f"rank-{rank}",
        "step",
        **{
            "step": number,
            "epoch": number // 100,
            "loss": 1.0 + 2.0 * math.exp(-number / 80),
            "lr": 1e-3,
            "samples": 64,
            "share": 16,
            "step_s": STEP_S,
            "data_s": 0.01,
            "compute_s": 0.05,
            "wait_s": 0.02,
            "optimizer_s": 0.01,
            "bytes_sent": 1000,
        }
        | fields,
    )


def training(first: int, last: int, *, t: float = 1000.0, world_size: int = 4) -> list[Event]:
    """One attempt from its start to step `last`, without an end."""
    events = [started(t, rank, world_size) for rank in range(world_size)]
    for count, number in enumerate(range(first, last + 1), 1):
        events += [step(t + count * STEP_S, rank, number) for rank in range(world_size)]
    return events


def finished(t: float, rank: int, **fields: Any) -> Event:
    """The end of one rank."""
    told = {
        "reason": "steps",
        "peak_memory_bytes": 300_000_000 + rank,
        "bytes_sent": 0,
        "seconds": t - (2000 if t >= 2000 else 1000),
    }
    return event(t, f"rank-{rank}", "run_finished", **told | fields)


def write_run(path: Path, events: list[Event], *, plan: str = "[layout]\nreplicate = 4\n") -> Run:
    """Make a run directory that holds `events`, one file a source."""
    run = Run(path)
    run.events.mkdir(parents=True)
    run.plan.write_text(plan)
    run.write_info({"job": "charlm.py:job", "arguments": {"layers": 4}, "plan_hash": "3f9a0c1d"})
    for one in events:
        with (run.events / f"{one['source']}.jsonl").open("a") as file:
            file.write(json.dumps(one) + "\n")
    return run
