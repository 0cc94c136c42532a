"""Which of several failures was the first, and how to tell it to the user: once, with what they need to mend it."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from shoal.errors import WorkerFailedError
from shoal.events import Event, read_events
from shoal.run import Run

_TAIL_LINES = 15


def explain(run: Run, failed: Mapping[int, int], *, since: float) -> WorkerFailedError:
    """Make the error that tells why a run ended badly.

    Args:
        failed: exit codes, by rank, of the workers that ended badly and were not killed by the launcher; first to last.
        since: when this attempt began, in Unix seconds; what was logged before is another attempt's.
    """
    told_since = [event for event in read_events(run.events) if float(event["t"]) >= since]
    errors = [event for event in told_since if event["kind"] == "error"]
    errors = [event for event in errors if event["source"] not in _strangers(told_since, failed)]
    told = {str(event["source"]) for event in errors}
    silent = [(rank, code) for rank, code in failed.items() if f"rank-{rank}" not in told]
    if not errors and not silent:
        return WorkerFailedError(
            f"all workers left before training had come to its end; --run {run.path} --resume goes on from the newest "
            "checkpoint"
        )
    causes = [event for event in errors if not event.get("symptom")]
    if by_signal := [(rank, code) for rank, code in silent if code < 0]:
        return WorkerFailedError(_of_exit(*by_signal[0], run))
    if causes or not silent:
        return WorkerFailedError(_of_event((causes or errors)[0], run))
    return WorkerFailedError(_of_exit(*silent[0], run))


def _strangers(events: Sequence[Event], failed: Mapping[int, int]) -> set[str]:
    """Who failed without ever having been a member: others' workers that were not let in."""
    members = {f"rank-{seat}" for event in events if event["kind"] == "view" for seat in event["seats"]}
    ranks = {source for event in events if (source := str(event["source"])).startswith("rank-")}
    return ranks - members - {f"rank-{rank}" for rank in failed} if members else set()


def _of_event(event: Event, run: Run) -> str:
    rank = str(event["source"]).replace("-", " ")
    trace = str(event.get("traceback") or "").rstrip()
    if not trace:
        return f"{rank}: {event['message']}"
    return f"{rank} failed, and the others were stopped:\n\n{trace}\n\nThe whole log: {_log(run, event['source'])}"


def _of_exit(rank: int, code: int, run: Run) -> str:
    how = f"exit code {code}"
    if code < 0:
        how = f"signal {-code} ({signal.Signals(-code).name})"
        if code == -signal.SIGKILL:
            how += ": somebody killed it, or the system did for want of memory"
    tail = _tail(_log(run, f"rank-{rank}"))
    said = f"\n\nIts last lines:\n{tail}" if tail else "; it had printed nothing"
    return f"rank {rank} died with {how}, and the others were stopped{said}"


def _log(run: Run, source: str) -> Path:
    return run.logs / f"{source}.log"


def _tail(path: Path) -> str:
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(f"    {line}" for line in lines[-_TAIL_LINES:])
