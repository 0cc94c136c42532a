"""Every error Shoal raises on purpose, as one tree.

ShoalError
├── UsageError (also ValueError)     the user can mend it: a name, a value, a combination
│   ├── TargetError                  the job's name or its arguments
│   ├── JobError                     what the job function returned, or did
│   ├── PlanError                    plan.toml or a flag that changes it
│   ├── ClusterError                 cluster.toml or --lab
│   ├── FaultsError                  faults.toml, or a fault that cannot be rehearsed here
│   ├── RunError                     the run directory: exists, missing, not writable
│   ├── SecretsError                 the file of the parameter servers' keys
│   └── MissingExtra                 an optional dependency that is not installed
├── MachineError                     this machine lacks a right, a device or space
│   └── LabError                     the emulated cluster could not be made
├── CheckpointError                  no checkpoint could be written or read
├── NonFiniteLossError               training diverged
├── WireError                        between processes
│   ├── RendezvousError              a rank could not join
│   ├── PlanMismatchError            a rank with another plan tried to join
│   ├── PeerLostError                a rank vanished while others talked to it
│   ├── CoordinatorError             the coordinator refused or cannot be reached
│   ├── RunEnded                     the coordinator has ended the run: there is no next view
│   ├── ServerLostError              a parameter server cannot be reached, or vanished with no replica left
│   └── ServerRefusedError           a parameter server refused a request: wrong key, unknown name, row out of range
└── WorkerFailedError                a launched process ended badly; carries its report

A message says what was got, what was expected, where, and what to do about it.
"""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable
from pathlib import Path


class ShoalError(Exception):
    """The root of the tree; `except ShoalError` catches all that Shoal raises on purpose."""


class UsageError(ShoalError, ValueError):
    """A mistake the user can mend."""


class TargetError(UsageError):
    """The job's name (`path.py:function`) or its `--set` arguments are wrong."""


class JobError(UsageError):
    """The job function returned something unusable, or one of its parts did."""


class PlanError(UsageError):
    """A plan, or a flag that changes it, is wrong."""


class ClusterError(UsageError):
    """A cluster description is wrong."""


class FaultsError(UsageError):
    """A list of faults is wrong, or asks for one that cannot be rehearsed where the run is."""


class RunError(UsageError):
    """A run directory exists already, does not exist, or cannot be written."""


class SecretsError(UsageError):
    """The file of the parameter servers' keys cannot be read, or is not safe."""


class MissingExtra(UsageError):  # noqa: N818 - the name users search for
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package}, which is not installed: pip install 'shoal[{extra}]'")


class MachineError(ShoalError):
    """This machine lacks a right, a device or space."""


class LabError(MachineError):
    """The emulated cluster could not be made."""


class CheckpointError(ShoalError):
    """No checkpoint could be written or read."""


class NonFiniteLossError(ShoalError):
    """The loss became NaN or infinite."""


class WireError(ShoalError):
    """Something went wrong between processes."""


class RendezvousError(WireError):
    """A rank could not join."""


class PlanMismatchError(WireError):
    """A rank with another plan, job or version tried to join."""


class PeerLostError(WireError):
    """A rank vanished while others waited for it."""


class CoordinatorError(WireError):
    """The coordinator refused or cannot be reached. `refused`: asking again will not help."""

    def __init__(self, message: str, *, refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused


class RunEnded(WireError):  # noqa: N818 - it tells of an end, which need not be an error
    """The coordinator has ended the run: there is no next view. `failed`: a member's failure ended it."""

    def __init__(self, reason: str, *, failed: bool) -> None:
        super().__init__(reason)
        self.failed = failed


class ServerLostError(WireError):
    """A parameter server cannot be reached, or vanished and nobody else holds its keys."""


class ServerRefusedError(WireError):
    """A parameter server refused a request or the connection: asking again will not help."""


class WorkerFailedError(ShoalError):
    """A launched process ended badly. The message is the whole report for the user."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the valid name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""


def user_traceback(error: BaseException) -> str:
    """The traceback from the user's own code on, without what Shoal, torch and the import system did to get there."""
    ours = (str(Path(__file__).parent), "<frozen")
    stack = traceback.TracebackException.from_exception(error)
    frames = list(stack.stack)
    theirs = [
        i for i, f in enumerate(frames) if not f.filename.startswith(ours) and "/site-packages/torch/" not in f.filename
    ]
    stack.stack = traceback.StackSummary.from_list(frames[theirs[0] if theirs else 0 :])
    return "".join(stack.format())
