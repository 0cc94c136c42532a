"""The event log folded into a `History`.

`fold` takes events as `EventReader.poll` returns them and may be called again with what is new. Unknown kinds and
fields are passed over; a number that is missing, null or not finite becomes None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from shoal.dashboard.history import History
from shoal.dashboard.members import Members
from shoal.dashboard.records import Breakdown, Checkpoint, CurvePoint, Failure, Note, ValidationPoint
from shoal.events import Event

# These move the clock. A warning on the way to a resume does not, nor does what comes after training (the sample).
_TRAINING_KINDS = frozenset({"run_started", "step", "validation", "checkpoint_saved"})


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
