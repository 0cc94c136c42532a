"""What a worker's process begins with, however it joins the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shoal._version import __version__
from shoal.engine.control import StopRequest
from shoal.errors import RunError
from shoal.events import EventLog
from shoal.job.target import Target, code_of
from shoal.plan import Plan, plan_hash
from shoal.run import Run


@dataclass(frozen=True)
class Start:
    """One worker.

    Attributes:
        seat: its number among all workers that ever were; for ranks that stay from beginning to end, the rank.
    """

    run: Run
    seat: int
    log: EventLog
    stop_request: StopRequest
    resume: bool


def target_of_run(run: Run) -> Target:
    """The job that a run trains, with its arguments.

    Raises:
        RunError: the run directory does not say.
    """
    info = run.read_info()
    try:
        name = str(info["job"])
        return Target(name=name, arguments=dict(info["arguments"]), code=code_of(name))
    except KeyError as missing:
        raise RunError(f"{run.path / 'run.json'} has no {missing.args[0]!r}; is it another version's?") from None


def fingerprint(plan: Plan, target: Target) -> dict[str, str]:
    """What must be equal on every rank, by name."""
    return {
        "plan hash": plan_hash(plan),
        "job": f"{target.name.rpartition('/')[2]} {dict(target.arguments)}",
        "code": target.code[:12],
        "shoal version": __version__,
        "torch version": torch.__version__,
    }
