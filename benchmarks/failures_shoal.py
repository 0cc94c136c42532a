"""Trains by Shoal on emulated nodes while failures are rehearsed, and returns the event log."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

from shoal.engine.checkpoint import archive
from shoal.errors import LabError
from shoal.events import Event, EventReader, read_events
from shoal.job.target import resolve
from shoal.plan import Plan, dump_plan
from shoal.plan.schema import BatchConfig, CheckpointConfig, ComputeConfig, ElasticConfig, StopConfig, ValidationConfig
from shoal.training import Where, execute

JOB = f"{Path(__file__).with_name('charlm_without_sample.py')}:job"
NODES = 4
_ATTEMPTS, _PAUSE_S = 4, 20.0
Kept = TypeVar("Kept")


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained, and on what; the same for rivals. `arguments` are the job's."""

    arguments: tuple[str, ...]
    job: str = JOB
    batch: int = 8
    link: str = "1000mbit"
    lease_s: float = 3.0
    max_nodes: int = NODES
    restarts: int = 0
    checkpoint_every: int = 0
    seed: int = 0

    @property
    def lab(self) -> str:
        """As many nodes as there may be workers."""
        return f"nodes={self.max_nodes},link={self.link}"

    def plan(self, steps: int) -> Plan:
        """One thread a rank; two workers are enough to go on."""
        return Plan(
            seed=self.seed,
            batch=BatchConfig(size=self.batch),
            compute=ComputeConfig(device="cpu", threads=1),
            validation=ValidationConfig(every=0),
            checkpoint=CheckpointConfig(every=self.checkpoint_every, best=False),
            elastic=ElasticConfig(min_nodes=2, max_nodes=self.max_nodes, lease_s=self.lease_s, restarts=self.restarts),
            stop=StopConfig(steps=steps),
        )


def faults_toml(faults: list[Mapping[str, Any]]) -> str:
    """The text of a faults.toml."""
    lines = []
    for fault in faults:
        lines += ["[[fault]]", *(f"{key} = {_toml(value)}" for key, value in fault.items())]
    return "\n".join(lines) + "\n"


def rehearse(task: Task, steps: int, *faults: Mapping[str, Any]) -> list[Event]:
    """Train `steps` steps on the lab with faults; return the events."""

    def once() -> list[Event]:
        with tempfile.TemporaryDirectory(prefix="shoal-failures-") as folder:
            file = Path(folder) / "faults.toml"
            file.write_text(faults_toml(list(faults)))
            where = Where(nodes=NODES, on="lab", lab=task.lab, faults=file if faults else None)
            target, run = resolve(task.job, task.arguments), Path(folder) / "run"
            execute(target, task.plan(steps), where, run, resume=False, limits={})
            return _whole(read_events(run / "events"))

    return with_patience(once)


def killed_and_resumed(task: Task, steps: int, kill_at: int) -> dict[str, Any]:
    """Kill every process of a run at once, resume it, and hold it against one that was never killed."""
    with tempfile.TemporaryDirectory(prefix="shoal-failures-") as folder:
        plan = Path(folder) / "plan.toml"
        plan.write_text(dump_plan(task.plan(steps)))
        calm, killed = Path(folder) / "calm", Path(folder) / "killed"
        _finish(_shoal(task, calm, plan))
        process = _shoal(task, killed, plan)
        num_killed = _kill_all_at(process, killed / "events", kill_at)
        reached = max((e["step"] for e in read_events(killed / "events") if e["kind"] == "step"), default=0)
        began = time.monotonic()
        _finish(_shoal(task, killed, plan, "--resume"))
        events = read_events(killed / "events")
        losses = _differing_losses(read_events(calm / "events"), events)
        tensors = _differing_tensors(calm, killed, steps)
        return {
            "processes_killed": num_killed,
            "killed_after_step": reached,
            "resumed_at": next((e["step"] for e in events if e["kind"] == "resumed"), None),
            "seconds_of_second_run": time.monotonic() - began,
            "steps_compared": steps,
            "losses_differing": len(losses),
            "tensors_differing": len(tensors),
            "differing": [*map(str, losses), *tensors][:20],
        }


def with_patience(attempt: Callable[[], Kept]) -> Kept:
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


def _whole(events: list[Event]) -> list[Event]:
    if any(e.get("reason") == "interrupted" for e in events):
        raise KeyboardInterrupt
    return events


def _toml(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def _shoal(task: Task, run: Path, plan: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [Path(sys.executable).with_name("shoal"), "train", task.job, "--run", run, "--plan", plan]
    command += ["--nodes", NODES, "--on", "lab", "--lab", task.lab, *more]
    for argument in task.arguments:
        command += ["--set", argument]
    with run.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, start_new_session=True)


def _finish(process: subprocess.Popen[bytes], timeout_s: float = 1800) -> None:
    try:
        code = process.wait(timeout_s)
    except BaseException:
        _kill(process)
        raise
    if code:
        raise SystemExit(f"`{' '.join(map(str, process.args))}` ended with {code}")  # type: ignore[arg-type]


def _kill_all_at(process: subprocess.Popen[bytes], events: Path, step: int) -> int:
    """Wait until a step is committed, then kill the launcher and all that it started; return how many."""
    reader, reached, deadline = EventReader(events), 0, time.monotonic() + 600
    while reached < step:
        if process.poll() is not None or time.monotonic() > deadline:
            _kill(process)
            raise SystemExit(f"the run ended, or stood still, before step {step}")
        reached = max([reached, *(e["step"] for e in reader.poll() if e["kind"] == "step")])
        time.sleep(0.005)
    return _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> int:
    """Kill a process and its descendants, as fast as one after the other can be."""
    try:
        pids = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        pids = []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    return len(pids)


def _differing_losses(calm: list[Event], killed: list[Event]) -> list[int]:
    """Steps at which any rank of any attempt told another loss than the run that was never killed."""
    expected = {e["step"]: e["loss"] for e in calm if e["kind"] == "step"}
    told = [(e["step"], e["loss"]) for e in killed if e["kind"] == "step"]
    absent = set(expected) - {step for step, _ in told}
    return sorted(absent | {step for step, loss in told if expected.get(step) != loss})


def _differing_tensors(calm: Path, killed: Path, steps: int) -> list[str]:
    """Names of parameters and optimizer states that are not the same to the last bit after `steps`."""
    (_, expected), (_, got) = (archive.read(run / "checkpoints" / f"step-{steps:08}") for run in (calm, killed))
    names = set(expected) ^ set(got)
    return sorted(names | {name for name in set(expected) & set(got) if not torch.equal(expected[name], got[name])})
