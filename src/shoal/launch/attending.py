"""How a worker that attends to a coordinator is started, by whoever starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from shoal.cluster.invitation import Invitation, authority_file
from shoal.errors import MachineError
from shoal.launch.placement import Placement
from shoal.launch.processes import open_process
from shoal.run import Run

FINISHED = b'"kind":"run_finished"'
_BEGAN = b'"kind":"run_started"'


def start_worker(
    run: Run, invitation: Invitation, seat: int, placement: Placement, *, neighbours: int
) -> subprocess.Popen[bytes]:
    """Start the worker of `seat`. `neighbours`: the workers of its node, itself included, which share its cores."""
    env: Mapping[str, str] = {
        **os.environ,
        "SHOAL_COORDINATOR": invitation.address,
        "SHOAL_TOKEN": invitation.token,
        "SHOAL_AUTHORITY": str(authority_file(run)) if invitation.tls else "",
        "SHOAL_SEAT": str(seat),
        "SHOAL_NODE": placement.node,
        "SHOAL_NODE_WORKERS": str(neighbours),
        "SHOAL_CONTROL": "stdin",
        "RANK": str(seat),
        "PYTHONUNBUFFERED": "1",
        **placement.env,
    }
    command = [*placement.prefix, sys.executable, "-m", "shoal.engine.worker", str(run.path)]
    command += ["--resume"] if invitation.resume else []
    return open_process(command, env, log_of(run, seat))


def log_of(run: Run, seat: int) -> Path:
    """The file of what a seat's worker prints."""
    return run.logs / f"rank-{seat}.log"


def has_finished(run: Run, seat: int, attempt: str) -> bool:
    """Whether a seat's worker came to the end of training in that attempt at the run, and did not only leave."""
    path = run.events / f"rank-{seat}.jsonl"
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise MachineError(f"cannot read the event log {path}: {error.strerror}") from None
    began = max((place for place, line in enumerate(lines) if _BEGAN in line), default=None)
    if began is None or f'"attempt":"{attempt}"'.encode() not in lines[began]:
        return False
    return any(FINISHED in line for line in lines[began:])
