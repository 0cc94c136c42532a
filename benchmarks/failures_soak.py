"""Many random faults in one run, then an audit of what they may not have changed.

Every sample once an epoch, no step twice, the loss of a run without faults, no process left over; and whether workers
that lived long gathered descriptors or memory.
"""

from __future__ import annotations

import math
import os
import statistics
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import psutil

from failures_shoal import NODES, with_patience
from shoal.dashboard.audit import audit
from shoal.errors import ShoalError
from shoal.events import Event, read_events
from shoal.job.target import resolve
from shoal.plan import Plan
from shoal.plan.schema import BatchConfig, CheckpointConfig, ComputeConfig, ElasticConfig, StopConfig, ValidationConfig
from shoal.training import Where, execute

# What is named more often is drawn more often. Joins no more often than preemptions: else ever more workers wait.
KINDS = ("kill",) * 3 + ("freeze",) * 2 + ("cut",) * 2 + ("slow", "slow_link", "join", "preempt", "kill_coordinator")
JOB = f"{Path(__file__).parents[1] / 'examples' / 'digits.py'}:job"
NUM_SAMPLES, BATCH = 1437, 64
_STEPS_AN_EPOCH = math.ceil(NUM_SAMPLES / BATCH)
_SAMPLE_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Soak:
    """How much, and how dense: a fault every so many steps, the least and the most; and the runs without faults."""

    faults: int
    seed: int = 0
    every_steps: tuple[int, int] = (20, 80)
    lease_s: float = 2.0
    link: str = "100mbit"
    calm: int = 2

    @property
    def epochs(self) -> int:
        """Enough for all faults, with room for those that have to wait for a worker to come back."""
        return math.ceil(1.5 * self.faults * statistics.mean(self.every_steps) / _STEPS_AN_EPOCH) + 3

    def toml(self) -> str:
        """The faults.toml."""
        kinds = ", ".join(f'"{kind}"' for kind in KINDS)
        return (
            f"seed = {self.seed}\n[random]\ncount = {self.faults}\nkinds = [{kinds}]\nspare = 2\n"
            f"every_steps = {list(self.every_steps)}\nseconds = [0.3, {2 * self.lease_s}]\nfactor = [2.0, 6.0]\n"
        )

    def plan(self, seed: int) -> Plan:
        """Workers that die are started again, always; validated four times."""
        every = max(1, self.epochs // 4) * _STEPS_AN_EPOCH
        return Plan(
            seed=seed,
            batch=BatchConfig(size=BATCH),
            compute=ComputeConfig(device="cpu", threads=1),
            validation=ValidationConfig(every=every),
            checkpoint=CheckpointConfig(every=every, best=False),
            elastic=ElasticConfig(min_nodes=1, max_nodes=NODES + 1, lease_s=self.lease_s, restarts=1_000_000),
            stop=StopConfig(epochs=self.epochs),
        )


class Sample(NamedTuple):
    """One look at one worker."""

    t: float
    descriptors: int
    threads: int
    megabytes: float


@dataclass
class Watch:
    """Looks at all workers of a run about once a second, from a thread of its own."""

    run: Path
    samples: dict[int, list[Sample]] = field(default_factory=dict)
    _over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Watch:
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def processes(self) -> list[psutil.Process]:
        """All processes of the run, whoever their parent is."""
        return [p for p in psutil.process_iter() if p.pid != os.getpid() and _is_of(p, self.run)]

    def trends(self, longer_than_s: float) -> list[dict[str, float]]:
        """For each worker that was seen so long: how its figures grew in the second half of its life."""
        long = {pid: seen for pid, seen in self.samples.items() if seen[-1].t - seen[0].t > longer_than_s}
        return [_trend(pid, seen) for pid, seen in long.items() if len(seen) > 5]

    def _look(self) -> None:
        while not self._over.wait(_SAMPLE_S):
            for process in self.processes():
                try:
                    if "shoal.engine.worker" in process.cmdline():
                        megabytes = process.memory_info().rss / 1e6
                        seen = Sample(time.monotonic(), process.num_fds(), process.num_threads(), megabytes)
                        self.samples.setdefault(process.pid, []).append(seen)
                except psutil.Error:
                    continue


def soak(wanted: Soak) -> dict[str, Any]:
    """Run, with faults and without, and audit."""
    return with_patience(lambda: _soak(wanted))


def _soak(wanted: Soak) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="shoal-soak-") as name:
        folder = Path(name)
        file = folder / "faults.toml"
        file.write_text(wanted.toml())
        soaked = _watched(wanted, folder / "soaked", wanted.seed, file)
        calm = [_watched(wanted, folder / f"calm-{seed}", seed, None) for seed in _seeds(wanted)]
        return {
            "faults_wanted": wanted.faults,
            "epochs": wanted.epochs,
            **soaked,
            **_told(read_events(folder / "soaked" / "events")),
            "log": chronicle(read_events(folder / "soaked" / "events")),
            "val_loss_without_faults": [figures["val_loss"] for figures in calm],
            "without_faults": calm,
        }


def _watched(wanted: Soak, run: Path, seed: int, faults: Path | None) -> dict[str, Any]:
    """Train; what went wrong, the end, and what was seen of the processes."""
    began = time.monotonic()
    with Watch(run) as watch:
        failure = _train(wanted, run, seed, faults)
        seconds = time.monotonic() - began
        left = watch.processes()
    trends = watch.trends(longer_than_s=min(60.0, seconds / 3))
    last = _last_validation(read_events(run / "events"))
    return {
        "seed": seed,
        "seconds": seconds,
        "failure": failure,
        "val_loss": last.get("loss"),
        "metrics": last.get("metrics"),
        "orphans": len(left),
        "workers_seen": len(watch.samples),
        **{
            f"{name}_a_minute": [trend[f"{name}_a_minute"] for trend in trends]
            for name in ("descriptors", "threads", "megabytes")
        },
        "trends": trends,
    }


def _seeds(wanted: Soak) -> range:
    """Of the runs without faults: the same, and others, to see by how much a loss differs anyway."""
    return range(wanted.seed, wanted.seed + wanted.calm)


def _train(wanted: Soak, run: Path, seed: int, faults: Path | None) -> str | None:
    """Train; return what went wrong."""
    where = Where(nodes=NODES, on="lab", lab=f"nodes={NODES},link={wanted.link}", faults=faults)
    try:
        execute(resolve(JOB), wanted.plan(seed), where, run, resume=False, limits={})
    except ShoalError as error:
        return f"{type(error).__name__}: {error}"
    return None


def _told(events: list[Event]) -> dict[str, Any]:
    """What the log says of faults, views and steps."""
    found = audit(events, NUM_SAMPLES)
    injected = Counter(e["fault"] for e in events if e["kind"] == "fault_injected")
    return {
        "injected": dict(injected),
        "num_injected": injected.total(),
        "views": len({e["epoch"] for e in events if e["kind"] == "view"}),
        "steps": max((e["step"] for e in events if e["kind"] == "step"), default=0),
        "epochs_audited": found.epochs,
        "spans_missing": sum(map(len, found.missing.values())),
        "spans_twice": sum(map(len, found.twice.values())),
        "steps_disputed": len(found.disputed),
        "audit": {"missing": found.missing, "twice": found.twice, "disputed": found.disputed},
        "ended": sorted({e["reason"] for e in events if e["kind"] == "run_finished"}),
        "exits": dict(Counter(str(e["exit_code"]) for e in events if e["kind"] == "worker_exited")),
        "errors": [f"{e['source']}: {e['message'][:300]}" for e in events if e["kind"] == "error"],
        "warnings": [f"{e['source']}: {e['message'][:300]}" for e in events if e["kind"] == "warning"],
    }


def chronicle(events: list[Event]) -> list[str]:
    """What happened, a line each: every fault as it began, and every view as the first of its members told of it."""
    began, seen, lines = events[0]["t"], set(), []
    for event in events:
        at = f"{event['t'] - began:7.1f} s  "
        if event["kind"] == "fault_injected":
            lines.append(f"{at}fault at step {event['step']}: {event['fault']}: {event['detail']}")
        elif event["kind"] == "view" and event["epoch"] not in seen:
            seen.add(event["epoch"])
            seats = ", ".join(map(str, event["seats"]))
            lines.append(f"{at}view {event['epoch']} from step {event['step']} with seats {seats}: {event['cause']}")
        elif event["kind"] == "run_finished":
            lines.append(f"{at}{event['source']}: {event['reason']} after step {event['steps']}")
    return lines


def _last_validation(events: list[Event]) -> Event:
    return next((e for e in reversed(events) if e["kind"] == "validation"), {})


def _is_of(process: psutil.Process, run: Path) -> bool:
    """Whether a process works for a run: its command line names a file there. One that is no more does not."""
    try:
        return any(str(run) in word for word in process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _trend(pid: int, seen: list[Sample]) -> dict[str, Any]:
    """Growth a minute, by least squares over the second half; and some of all samples, for a closer look."""
    settled = seen[len(seen) // 2 :]
    minutes = (np.array([s.t for s in settled]) - settled[0].t) / 60
    told: dict[str, Any] = {"pid": pid, "seconds": seen[-1].t - seen[0].t}
    for name in ("descriptors", "threads", "megabytes"):
        values = [float(getattr(s, name)) for s in settled]
        told[f"{name}_a_minute"] = float(np.polyfit(minutes, values, 1)[0])
    told["samples"] = [[round(value, 1) for value in sample] for sample in seen[:: 1 + len(seen) // 60]]
    return told
