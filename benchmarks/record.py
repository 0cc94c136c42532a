"""One training on emulated nodes, by Shoal or by stock DistributedDataParallel, and the record of it.

Both sides train the same job on the same samples in the same order, and write the same events. Seconds begin with the
first step, so that starting processes counts for neither; bytes are payload, the mean over ranks.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

import shoal
from harness import run_workers
from shoal.cluster.description import parse_lab
from shoal.errors import LabError
from shoal.events import Event, read_events
from shoal.job.target import resolve
from shoal.launch.lab.lab import Lab
from shoal.plan import Plan, dump_plan, resolve_plan
from shoal.plan.schema import StopConfig
from step_time import MODELS

JOB = f"{Path(__file__).with_name('charlm_without_sample.py')}:job"
_ATTEMPTS, _PAUSE_S = 4, 20.0
CLIP_NORM = 1.0


@dataclass(frozen=True, kw_only=True)
class Task:
    """What both sides train, whatever the plan says of it: `steps` or `seconds` long, validated every so many steps."""

    model: str = "3M"
    batch: int = 32
    seed: int = 0
    steps: int | None = None
    seconds: float | None = None
    validate_every: int = 0
    validation_samples: int = 256

    def over(self, plan: Plan) -> Plan:
        """`plan` for this task: one thread a rank, no checkpoint before the end."""
        every = {"every": self.validate_every, "samples": self.validation_samples}
        return dataclasses.replace(
            plan,
            seed=self.seed,
            batch=dataclasses.replace(plan.batch, size=self.batch),
            compute=dataclasses.replace(plan.compute, device="cpu", threads=1, clip_norm=CLIP_NORM),
            validation=dataclasses.replace(plan.validation, **every),
            checkpoint=dataclasses.replace(plan.checkpoint, every=0, best=False),
            stop=StopConfig(steps=self.steps, seconds=self.seconds),
        )


class Point(NamedTuple):
    """A validation: what had been spent until then, and the loss."""

    step: int
    seconds: float
    megabytes: float
    loss: float


@dataclass(frozen=True)
class Record:
    """The figures of one training.

    Attributes:
        ends: for each rank the moment at which each of its steps ended, in seconds.
        step_s: for each rank what each step took.
        shares: for each rank its samples in each step.
        megabytes: payload that a rank sent, the mean over ranks, in the whole training.
        interface_megabytes: what rank 0's network interface counted; 0 where nobody looked.
        rhythm: steps between two exchanges of the same part of the model, where a plan chose it.
    """

    ends: list[list[float]]
    step_s: list[list[float]]
    shares: list[list[int]]
    megabytes: float
    interface_megabytes: float = 0.0
    rhythm: int | None = None
    validations: list[Point] = field(default_factory=list)

    @classmethod
    def of(cls, events: list[Event]) -> Self:
        """Read a run's event log."""
        steps: dict[str, list[Event]] = {}
        for event in events:
            if event["kind"] == "step":
                steps.setdefault(event["source"], []).append(event)
        ranks = [steps[source] for source in sorted(steps, key=lambda name: int(name.rpartition("-")[2]))]
        finished = [int(e["bytes_sent"]) for e in events if e["kind"] == "run_finished"]
        rhythms = [int(e["every"]) for e in events if e["kind"] == "rhythm"]
        return cls(
            ends=[[e["t"] for e in rank] for rank in ranks],
            step_s=[[e["step_s"] for e in rank] for rank in ranks],
            shares=[[e["share"] for e in rank] for rank in ranks],
            megabytes=statistics.mean(finished) / 1e6,
            interface_megabytes=sum(e.get("interface_bytes", 0) for e in ranks[0]) / 1e6,
            rhythm=rhythms[-1] if rhythms else None,
            validations=_validations(events, ranks, sum(finished)),
        )

    @property
    def num_steps(self) -> int:
        """Steps of rank 0."""
        return len(self.step_s[0])

    @property
    def megabytes_per_step(self) -> float:
        """Payload a rank and step."""
        return self.megabytes / self.num_steps

    def step_seconds(self, warm_up: int) -> float:
        """The median of rank 0's steps after the first `warm_up`."""
        return statistics.median(self.step_s[0][warm_up:])

    def median_rate(self, warm_up: int) -> float:
        """Samples a second by the median step after the start-up: a step that waits now and then does not show."""
        return sum(shares[-1] for shares in self.shares) / self.step_seconds(warm_up)

    def rate(self, warm_up: int) -> float:
        """Samples a second over all steps after the start-up, the waiting ones included: the sum of `rank_rates`."""
        return sum(self.rank_rates(warm_up))

    def rank_rates(self, warm_up: int) -> list[float]:
        """Samples a second of each rank while all of them train: from the last to start up to the first to end."""
        begin = max(ends[min(max(warm_up, 1), len(ends)) - 1] for ends in self.ends)
        end = min(ends[-1] for ends in self.ends)
        return [_rate(ends, shares, begin, end) for ends, shares in zip(self.ends, self.shares, strict=True)]

    def seconds_to(self, loss: float) -> float | None:
        """Seconds until the first validation with a loss as low; None if there was none."""
        return next((point.seconds for point in self.validations if point.loss <= loss), None)

    def plain(self) -> dict[str, Any]:
        """What is stored: the rest can be had from it."""
        start = min(ends[0] - step_s[0] for ends, step_s in zip(self.ends, self.step_s, strict=True))
        return {
            "rhythm": self.rhythm,
            "megabytes": self.megabytes,
            "interface_megabytes": self.interface_megabytes,
            "validations": self.validations,
            "ends": [[round(t - start, 4) for t in ends] for ends in self.ends],
            "step_s": [[round(s, 4) for s in step_s] for step_s in self.step_s],
            "shares": self.shares,
        }


def train_shoal(plan: Plan, task: Task, lab: str) -> Record:
    """Train by a plan on the lab."""

    def once() -> Record:
        with tempfile.TemporaryDirectory(prefix="shoal-benchmark-") as folder:
            run = Path(folder) / "run"
            target = resolve(JOB, MODELS[task.model])
            shoal.train(target, plan=task.over(plan), on="lab", lab=lab, run=run, progress=False)
            events = read_events(run / "events")
        if any(e.get("reason") == "interrupted" for e in events):
            raise KeyboardInterrupt
        return Record.of(events)

    return _with_patience(once)


def train_ddp(task: Task, lab: str, system: str = "ddp") -> Record:
    """Train by DistributedDataParallel ("fsdp", "hsdp": these) on the lab; on a lab of one rank, by the plain loop."""
    cluster = parse_lab(lab)

    def once() -> Record:
        with tempfile.TemporaryDirectory(prefix="shoal-benchmark-") as folder, Lab(cluster) as emulated:
            settings = {
                "job": JOB,
                "set": MODELS[task.model],
                "plan": dump_plan(resolve_plan(task.over(Plan()), cluster.world_size)),
                "events": folder,
                "system": system,
            }
            worker = Path(__file__).with_name("ddp_worker.py")
            run_workers(emulated.seating(), worker, settings, timeout_s=6 * 3600)
            return Record.of(read_events(Path(folder)))

    return _with_patience(once)


def _with_patience(attempt: Callable[[], Record]) -> Record:
    """A busy machine may fail the lab's own check of its links: try again a little later."""
    for number in range(1, _ATTEMPTS + 1):
        try:
            return attempt()
        except LabError as error:
            if number == _ATTEMPTS:
                raise
            print(f"attempt {number}: {error}", flush=True)
            time.sleep(_PAUSE_S)
    raise AssertionError


def _rate(ends: list[float], shares: list[int], begin: float, end: float) -> float:
    """Samples a second between two moments; a step's samples count evenly over the time since the step before."""
    if end <= begin:
        raise SystemExit("no time is left in which all ranks trained beyond the start-up; give more steps or seconds")
    at_begin, at_end = np.interp([begin, end], ends, np.cumsum(shares))
    return float(at_end - at_begin) / (end - begin)


def _validations(events: list[Event], ranks: list[list[Event]], total_bytes: int) -> list[Point]:
    """The last one is the end: it has cost all bytes. Of two after the same step the later one counts."""
    start = min(rank[0]["t"] - rank[0]["step_s"] for rank in ranks)
    points: dict[int, Point] = {}
    for event in (e for e in events if e["kind"] == "validation"):
        sent = sum(e["bytes_sent"] for rank in ranks for e in rank if e["t"] <= event["t"])
        points[event["step"]] = Point(event["step"], event["t"] - start, sent / len(ranks) / 1e6, event["loss"])
    if points:
        last = max(points)
        points[last] = points[last]._replace(megabytes=total_bytes / len(ranks) / 1e6)
    return [points[step] for step in sorted(points)]
