"""What a run has done so far: the event log folded into plain values.

`fold` takes events as `EventReader.poll` returns them and may be called again with what is new. Unknown kinds and
fields are passed over; a number that is missing, null or not finite becomes None.

A resumed run has several `run_started` events, and the steps after its last checkpoint ran twice. The curves keep
the occurrence that the model's weights come from, which is the later one. Time and bytes that were really spent
count in full: `seconds` is training time summed over attempts, without the gap in which the run was dead.

Reading files, drawing and judging are left to others.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from shoal.dashboard.members import Members
from shoal.dashboard.records import (
    Breakdown,
    Checkpoint,
    CurvePoint,
    Failure,
    Note,
    RankHistory,
    ValidationPoint,
)
from shoal.events import Event

# These move the clock. A warning on the way to a resume does not, nor does what comes after training (the sample).
_TRAINING_KINDS = frozenset({"run_started", "step", "validation", "checkpoint_saved"})


@dataclass
class History:
    """All that the readers show of a run. `fold` fills it; readers only look."""

    job: str = ""
    plan_hash: str = ""
    started: dict[str, Any] = field(default_factory=dict)  # the fields of rank 0's latest run_started
    started_t: float | None = None  # Unix seconds of the first run_started
    world_size: int = 0
    points: list[CurvePoint] = field(default_factory=list)
    validations: list[ValidationPoint] = field(default_factory=list)
    ranks: dict[int, RankHistory] = field(default_factory=dict)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    warnings: list[Note] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    exit_codes: dict[int, int] = field(default_factory=dict)  # of this attempt, by rank
    resumed_at: list[int] = field(default_factory=list)
    sample: str = ""
    layout: list[str] = field(default_factory=list)  # sentences
    bubbles: dict[int, tuple[float, float]] = field(default_factory=dict)  # by rank: measured, theoretical
    reason: str | None = None
    finished: dict[str, Any] = field(default_factory=dict)  # the fields of rank 0's run_finished
    seconds: float = 0.0
    attempt_t: float | None = None  # Unix seconds at which this attempt began
    earlier_s: float = 0.0  # training seconds of the attempts before this one
    failures_before: int = 0  # how many of `failures` belong to attempts before this one
    members: Members = field(default_factory=Members)
    attempt: str = ""  # its id

    def layout_lines(self) -> list[str]:
        """How the model lay over the ranks, and how long a pipeline's ranks stood still."""
        if not self.bubbles:
            return self.layout
        measured = ", ".join(f"{bubble:.0%}" for _, (bubble, _) in sorted(self.bubbles.items()))
        theoretical = next(iter(self.bubbles.values()))[1]
        return [*self.layout, f"the pipeline's bubble, by rank: {measured}; in theory {theoretical:.0%}"]

    @property
    def title(self) -> str:
        """The job's name without the folders before it."""
        return self.job.rpartition("/")[2]

    @property
    def step(self) -> int:
        """The last step that counts; 0 before the first."""
        if self.points:
            return self.points[-1].step
        return self.resumed_at[-1] if self.resumed_at else 0

    @property
    def samples(self) -> int:
        """Samples that the model has been trained on, over all ranks."""
        return self.points[-1].samples if self.points else 0

    @property
    def loss(self) -> float | None:
        """The last step's loss; None if there is none or it was not finite."""
        return self.points[-1].loss if self.points else None

    @property
    def best(self) -> ValidationPoint | None:
        """The latest validation marked best, else the one of lowest loss."""
        marked = [point for point in self.validations if point.best]
        if marked:
            return marked[-1]
        known = [point for point in self.validations if point.loss is not None]
        return min(known, key=lambda point: point.loss or 0.0, default=None)

    @property
    def state(self) -> str:
        """`finished`, `failed`, `unfinished` (running or killed) or `empty` (no step was taken)."""
        if self.reason is not None:
            return "finished"
        lost = any(self.exit_codes.values()) and not self.members.views  # elastic runs go on without some
        if len(self.failures) > self.failures_before or lost:
            return "failed"
        return "unfinished" if self.points else "empty"

    def step_s_median(self, last: int | None = None) -> float | None:
        """Median duration of the last `last` steps, in seconds (None: of all)."""
        return _median([point.step_s for point in self._tail(last)])

    def samples_per_s(self, last: int | None = None) -> float | None:
        """Median over the last `last` steps (None: over all) of global samples by seconds of the step."""
        return _median([p.step_samples / p.step_s for p in self._tail(last) if p.step_s > 0])

    def wire_bytes_per_s(self) -> float:
        """What all ranks together put on the wire in their recent steps."""
        recent = [rank.recent_total() for rank in self.ranks.values()]
        return sum(total.bytes_sent / total.total_s for total in recent if total.total_s > 0)

    def rank(self, rank: int) -> RankHistory:
        """The history of one rank, made empty if nothing was heard of it yet."""
        return self.ranks.setdefault(rank, RankHistory(rank))

    def at(self, event: Event) -> float:
        """Training seconds at which `event` happened."""
        if self.attempt_t is None:
            return self.earlier_s
        return self.earlier_s + max(0.0, float(event["t"]) - self.attempt_t)

    def _tail(self, last: int | None) -> list[CurvePoint]:
        return self.points if last is None else self.points[-last:]


def fold(events: Iterable[Event], history: History | None = None) -> History:
    """Fold `events`, ordered by time, into `history` (a new one if None) and return it."""
    history = History() if history is None else history
    for event in events:
        handler = _HANDLERS.get(str(event["kind"]))
        if handler is not None:
            handler(history, event)
        if _rank_of(event) == history.members.speaker and event["kind"] in _TRAINING_KINDS:
            history.seconds = history.at(event)
    return history


def summary(history: History, run: str) -> dict[str, Any]:
    """Return the run as one JSON object: the last line of `shoal train --json` and `shoal report --json`.

    Lists go by rank; a rank of which nothing is known has None. `loss` and `val_loss` are the last ones,
    `seconds` is training time over all attempts, and medians are over all steps.
    """
    step_s, best = history.step_s_median(), history.best
    last = history.validations[-1] if history.validations else None
    ranks = [history.ranks.get(rank) for rank in range(history.world_size)]
    return {
        "state": history.state,
        "reason": history.reason,
        "steps": history.step,
        "samples": history.samples,
        "seconds": round(history.seconds, 6),
        "step_ms_median": None if step_s is None else step_s * 1e3,
        "samples_per_second": history.samples_per_s(),
        "loss": history.loss,
        "val_loss": last.loss if last else None,
        "metrics": last.metrics if last else {},
        "best_val_loss": best.loss if best else None,
        "best_step": best.step if best else None,
        "ranks": history.world_size,
        "bytes_sent_per_rank": [rank.bytes_sent if rank else None for rank in ranks],
        "peak_memory_bytes_per_rank": [rank.peak_memory_bytes if rank else None for rank in ranks],
        "resumed_at": history.resumed_at,
        "views": len(history.members.views),
        "plan": history.plan_hash,
        "run": run,
    }


def _on_run_started(history: History, event: Event) -> None:
    rank = _rank_of(event)
    if rank is None:
        return
    heard = history.rank(rank)
    heard.bytes_before = heard.bytes_sent
    heard.node, heard.device = str(event.get("node") or ""), str(event.get("device") or "")
    history.world_size = max(history.world_size, _count(event, "world_size"), rank + 1)
    attempt = str(event.get("attempt") or "")
    if attempt != history.attempt or (rank == 0 and not attempt):
        history.attempt = attempt
        _begin_attempt(history, event)


def _begin_attempt(history: History, event: Event) -> None:
    history.earlier_s = history.seconds
    history.attempt_t = float(event["t"])
    history.started_t = history.attempt_t if history.started_t is None else history.started_t
    history.started = event
    history.job, history.plan_hash = str(event.get("job") or ""), str(event.get("plan_hash") or "")
    history.reason, history.finished = None, {}
    history.exit_codes, history.failures_before = {}, len(history.failures)
    if not history.members.is_ahead:
        history.members = Members()
    history.members.is_ahead = False


def _on_resumed(history: History, event: Event) -> None:
    step = _count(event, "step")
    history.resumed_at.append(step)
    _forget_from(history, step + 1)


def _on_step(history: History, event: Event) -> None:
    rank = _rank_of(event)
    if rank is None:
        return
    heard, times = history.rank(rank), _breakdown(event)
    history.world_size = max(history.world_size, rank + 1)
    heard.steps += 1
    heard.samples += _count(event, "share")
    heard.total.add(times)
    heard.recent.append(times)
    heard.bytes_sent += times.bytes_sent
    if rank == history.members.speaker:
        _add_point(history, event, heard.bytes_sent)


def _add_point(history: History, event: Event, bytes_sent: int) -> None:
    step, step_s = _count(event, "step"), _number(event, "step_s") or 0.0
    if history.attempt_t is None:  # the line that began the run was lost
        history.attempt_t = float(event["t"]) - step_s
        history.started_t = history.attempt_t
    if history.points and history.points[-1].step >= step:
        _forget_from(history, step)
    point = CurvePoint(
        step=step,
        epoch=_number(event, "epoch"),
        seconds=history.at(event),
        samples=history.samples + _count(event, "samples"),
        bytes_sent=bytes_sent,
        loss=_number(event, "loss"),
        lr=_number(event, "lr"),
        step_s=step_s,
        step_samples=_count(event, "samples"),
    )
    history.points.append(point)


def _forget_from(history: History, step: int) -> None:
    """Drop what the model has lost: the run went back to a checkpoint before `step`."""
    while history.points and history.points[-1].step >= step:
        history.points.pop()
    history.validations = [point for point in history.validations if point.step < step]


def _on_validation(history: History, event: Event) -> None:
    told = event.get("metrics")
    metrics = told if isinstance(told, dict) else {}
    point = ValidationPoint(
        step=_count(event, "step"),
        seconds=history.at(event),
        loss=_number(event, "loss"),
        metrics={str(name): finite(value) for name, value in metrics.items()},
        best=bool(event.get("best")),
        duration_s=_number(event, "seconds") or 0.0,
    )
    history.validations = [other for other in history.validations if other.step != point.step]
    history.validations.append(point)


def _on_checkpoint_saved(history: History, event: Event) -> None:
    checkpoint = Checkpoint(
        step=_count(event, "step"),
        seconds=history.at(event),
        path=str(event.get("path") or ""),
        size_bytes=_count(event, "size_bytes"),
        stall_s=_number(event, "stall_s") or 0.0,
        write_s=_number(event, "write_s") or 0.0,
    )
    history.checkpoints = [other for other in history.checkpoints if other.step != checkpoint.step]
    history.checkpoints.append(checkpoint)


def _on_checkpoint_failed(history: History, event: Event) -> None:
    _warn(history, event, f"no checkpoint at step {_count(event, 'step')}: {event.get('message') or ''}")


def _on_checkpoint_damaged(history: History, event: Event) -> None:
    _warn(history, event, f"damaged checkpoint {event.get('checkpoint')}: {event.get('message') or ''}")


def _on_warning(history: History, event: Event) -> None:
    _warn(history, event, str(event.get("message") or ""))


def _warn(history: History, event: Event, message: str) -> None:
    for note in history.warnings:
        if note.message == message:
            note.count += 1
            return
    # On the way to a resume the log's clock has run on, the training's has not.
    history.warnings.append(Note(message, str(event["source"]), history.seconds))


def _on_sample(history: History, event: Event) -> None:
    history.sample = str(event.get("text") or "")


def _on_error(history: History, event: Event) -> None:
    rank = _rank_of(event)
    if rank is not None and history.members.views and not history.members.includes(rank):
        _warn(history, event, f"rank {rank} did not come in: {event.get('message') or ''}")
        return
    step = _number(event, "step")
    failure = Failure(
        source=str(event["source"]),
        step=None if step is None else int(step),
        seconds=history.at(event),
        error=str(event.get("error") or "error"),
        message=str(event.get("message") or ""),
        traceback=str(event.get("traceback") or ""),
        symptom=bool(event.get("symptom")),
    )
    history.failures.append(failure)


def _on_layout(history: History, event: Event) -> None:
    history.layout = [str(sentence) for sentence in event.get("sentences") or ()]


def _on_bubble(history: History, event: Event) -> None:
    rank = _rank_of(event)
    if rank is not None:
        history.bubbles[rank] = (_number(event, "measured") or 0.0, _number(event, "theoretical") or 0.0)


def _on_run_finished(history: History, event: Event) -> None:
    rank = _rank_of(event)
    if rank is None:
        return
    heard = history.rank(rank)
    peak = _number(event, "peak_memory_bytes")
    if peak is not None:
        heard.peak_memory_bytes = max(heard.peak_memory_bytes or 0, int(peak))
    # Steps do not hold what was sent between them (the first broadcast, a peer's state); the attempt's end does.
    heard.bytes_sent = max(heard.bytes_sent, heard.bytes_before + _count(event, "bytes_sent"))
    if rank == history.members.speaker:
        history.seconds = max(history.seconds, history.earlier_s + (_number(event, "seconds") or 0.0))
        history.reason, history.finished = str(event.get("reason") or "finished"), event


def _on_view(history: History, event: Event) -> None:
    rank = _rank_of(event)
    if rank is None:
        return
    if event.get("epoch") == 1 and rank in history.members.beginners:
        history.members = Members()  # it begins once more: another attempt
    history.members.add(event, rank, history.at(event))


def _on_rolled_back(history: History, event: Event) -> None:
    step, before = _count(event, "step"), _count(event, "from_step")
    source = "a checkpoint on disk" if event.get("state_from") == "disk" else "the copies in other ranks' memory"
    _forget_from(history, step + 1)
    _warn(history, event, f"shards were lost: training went back from step {before} to {step}, to {source}")


def _on_worker_exited(history: History, event: Event) -> None:
    history.exit_codes[_count(event, "rank")] = _count(event, "exit_code")


_HANDLERS: dict[str, Callable[[History, Event], None]] = {
    "run_started": _on_run_started,
    "resumed": _on_resumed,
    "step": _on_step,
    "validation": _on_validation,
    "checkpoint_saved": _on_checkpoint_saved,
    "checkpoint_failed": _on_checkpoint_failed,
    "checkpoint_damaged": _on_checkpoint_damaged,
    "warning": _on_warning,
    "sample": _on_sample,
    "layout": _on_layout,
    "bubble": _on_bubble,
    "error": _on_error,
    "run_finished": _on_run_finished,
    "view": _on_view,
    "rolled_back": _on_rolled_back,
    "waiting": _on_warning,
    "stuck": _on_warning,
    "worker_exited": _on_worker_exited,
}


def finite(value: object) -> float | None:
    """Return `value` as a float if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _number(event: Event, name: str) -> float | None:
    return finite(event.get(name))


def _count(event: Event, name: str) -> int:
    return int(_number(event, name) or 0)


def _rank_of(event: Event) -> int | None:
    prefix, _, number = str(event["source"]).partition("-")
    return int(number) if prefix == "rank" and number.isdecimal() else None


def _breakdown(event: Event) -> Breakdown:
    names = ("step_s", "data_s", "compute_s", "wait_s", "optimizer_s")
    step_s, data_s, compute_s, wait_s, optimizer_s = (_number(event, name) or 0.0 for name in names)
    return Breakdown(
        data_s=data_s,
        compute_s=compute_s,
        wait_s=wait_s,
        optimizer_s=optimizer_s,
        other_s=max(0.0, step_s - data_s - compute_s - wait_s - optimizer_s),
        bytes_sent=_count(event, "bytes_sent"),
    )


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None
