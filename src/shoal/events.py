"""The event log: the one truth about a run, which every display reads.

Each process appends JSON lines to a file of its own (`events/rank-0.jsonl`, `events/launcher.jsonl`), so no lock is
needed and `kill -9` loses at most a line that was being written. Every event has `t` (Unix seconds, which never go back
in one file), `source` (`rank-0`, `launcher`) and `kind`:

| kind | written by | fields beside `t`, `source`, `kind` |
|---|---|---|
| run_started | every rank | attempt (its id), plan_hash, job, arguments, world_size, node, device, num_parameters, |
|  |  | steps_per_epoch, torch, shoal, stop |
| resumed | rank 0 | step, checkpoint |
| step | every rank | step, epoch, first (the batch's first position in the epoch's order), loss (global mean), lr, |
|  |  | samples (global), share (this rank's samples), step_s, |
|  |  | data_s, compute_s (forward and backward), wait_s (for the exchange), optimizer_s, |
|  |  | bytes_sent (by this rank in this step, on the wire) |
| rebalanced | rank 0 | step (after which batches are divided so), shares (samples of a whole batch, by rank), |
|  |  | seconds_per_sample (by rank, as measured; null: not yet known) |
| out_of_memory | any rank | epoch, first, samples, message: it had to give a step up, and all with it |
| slow | rank 0 | rank, node, cause (computing, data or link), factor (times a usual rank's), since_step, |
|  |  | persistent (bool), until_step (null: it lasts) |
| interval | rank 0 | steps (between checkpoints from now on), cost_s (of one), mtbf_s (between failures) |
| rhythm | rank 0 | every, fragments, overlap: of local steps, in steps |
| layout | rank 0 | sentences: where each axis came to lie, and what became of the model |
| bubble | rank | measured, theoretical: the part of a pipeline's time in which the rank computed nothing, 0 to 1 |
| consensus | rank 0 | step, distance (root mean square over ranks of the 2-norm from the mean of all replicas) |
| coordinator_started | launcher | address |
| coordinator_found | every rank | seat, epoch, away_s: that the coordinator was not heard of |
| coordinator_lost | every rank | message |
| waiting | every rank | message: what the coordinator waits for before it makes a view |
| view | every rank | epoch, rank, seats, nodes, cause, planned, step, took_state, givers (ranks that gave theirs), |
|  |  | connect_s, state_s, build_s, lost_s (since a loss was noticed; null: none was); of sharded |
|  |  | replicas also replicate, shard, state_from (live, memory, disk or start) |
| rolled_back | rank 0 | step, from_step (the last committed), state_from: shards were lost, and training goes back |
| view_lost | any rank | epoch, message: how it showed here |
| gradient_dropped | any rank | epoch, first, samples (of this rank): a step was taken without it, as the plan allows |
| left | any rank | step |
| caught_up | any rank | step, steps (taken at once), seconds: a newcomer holds what all hold |
| samples_lost | a rank | seat, first_step, last_step, samples: what a lost rank (gossip, local) alone had learned |
| made_up | any rank | step, steps: that it took by itself to come level with the others (gossip, local) |
| rounds | any rank | epoch (of the view that ended), step, merged (by fragment: rounds of local steps that it had |
|  |  | merged), taken (fragments whose last round it took from others), undone (whose round never happened) |
| residuals_reset | a rank | step: error feedback of local steps begins anew, without what had not been sent yet |
| gossip_memory_reset | a rank | step, epoch: neighbours begin anew to tell each other what they hold |
| step_in_name | a rank | seat, and the fields of `step`: a lost worker's part of a step, brought for it |
| stood_in | a rank | seat, first_step, last_step: all of that |
| server_started | every server | address, mode |
| members | every server | epoch, workers (seats), clock: whom it waits for from that step on |
| validation | rank 0 | step, loss, metrics {name: value}, seconds, best (bool) |
| checkpoint_saved | rank 0 | step, path (relative to the run), size_bytes, stall_s, write_s |
| checkpoint_failed | rank 0 | step, message |
| checkpoint_damaged | rank 0 | checkpoint, message |
| warning | any | message |
| sample | rank 0 | text (made by the job's `sample` function) |
| error | any rank | error (class name), message, traceback, symptom (true: another rank's failure showed here) |
| run_finished | every rank | reason, steps, samples, seconds and bytes_sent (of this attempt), loss, val_loss, |
|  |  | peak_memory_bytes, traffic (of this attempt's exchanges: {to rank: [messages, bytes]}) |
| worker_exited | launcher | rank, pid, exit_code (negative: the signal's number) |
| fault_injected | launcher | fault (its kind), rank, node, step, seconds (null: for good), detail: what was done |
| fault_ended | launcher | fault, rank, node, step, seconds (that it lasted), detail: how it ended |

A reader must ignore kinds and fields that it does not know.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from shoal.errors import MachineError

Event = dict[str, Any]
_MOST_WAITING_BYTES = 16 << 20
_JUMP_S = 5.0
"""A clock that is set by more than this between two events jumps; one that is set by less is followed."""
_TAIL_BYTES = 1 << 16


class EventLog:
    """Appends events to one file. Each line reaches the operating system before `write` returns.

    May be written to by several threads.
    """

    def __init__(self, path: Path, source: str, *, patience_s: float = 0.0) -> None:
        """`patience_s`: for how long events are kept, and written later, while the disk refuses them."""
        self.path = path
        self.source = source
        self._patience_s = patience_s
        self._refused_at: float | None = None
        self._waiting = b""
        self._lock = threading.Lock()
        _end_torn_line(path)
        self._time = _Time(_last_time(path))
        self._descriptor: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def write(self, kind: str, /, **fields: Any) -> None:
        """Append one event. Non-finite numbers are written as null, which JSON can carry.

        Raises:
            MachineError: the disk refused, for longer than it is waited for.
        """
        told = {name: _plain(value) for name, value in fields.items()}
        with self._lock:
            t, jump_s = self._time.now()
            if jump_s:
                message = f"the clock of {self.source} jumped by {jump_s:+,.0f} s; its events go on as if it had not"
                self._append(t, "warning", {"message": message})
            self._append(t, kind, told)
            self._flush()

    def close(self) -> None:
        """Close the file; the log must not be written to afterwards."""
        with self._lock:
            if self._descriptor is None:
                return
            with contextlib.suppress(OSError, MachineError):  # a full disk has been told when the event was written
                self._flush()
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, t: float, kind: str, fields: dict[str, Any]) -> None:
        event = {"t": round(t, 6), "source": self.source, "kind": kind} | fields
        self._waiting += json.dumps(event, separators=(",", ":")).encode() + b"\n"

    def _flush(self) -> None:
        assert self._descriptor is not None, "the log is closed"
        try:
            while self._waiting:
                self._waiting = self._waiting[os.write(self._descriptor, self._waiting) :]
            self._refused_at = None
        except OSError as error:
            self._refused_at = self._refused_at or time.monotonic()
            refused_s = time.monotonic() - self._refused_at
            if refused_s >= self._patience_s or len(self._waiting) > _MOST_WAITING_BYTES:
                reason = error.strerror or error
                raise MachineError(f"cannot write the event log {self.path}: {reason}") from None


class _Time:
    """The time of one log's events: the system's, but it never goes back, and does not jump when that is set anew."""

    def __init__(self, not_before: float) -> None:
        self._wall, self._steady = time.time(), _steady()
        self._latest = not_before
        self._ahead = max(0.0, not_before - self._wall)
        self._untold_s = -self._ahead if self._ahead > _JUMP_S else 0.0

    def now(self) -> tuple[float, float]:
        """Unix seconds, and by how many the system's clock has jumped since the last call; 0: it has not."""
        wall, steady = time.time(), _steady()
        moved_s = (wall - self._wall) - (steady - self._steady)
        self._wall, self._steady = wall, steady
        jump_s, self._untold_s = self._untold_s, 0.0
        if abs(moved_s) > _JUMP_S:
            self._ahead -= moved_s
            jump_s += moved_s
        self._latest = max(self._latest, wall + self._ahead)
        return self._latest, jump_s


def _steady() -> float:
    """Seconds that nobody can set; those in which the machine sleeps count, where the system tells them."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class EventReader:
    """Follows every event file of a folder: each `poll` returns what is new since the last."""

    def __init__(self, folder: Path, names: str = "*.jsonl") -> None:
        """`names`: a pattern of the files to follow."""
        self._folder = folder
        self._names = names
        self._offsets: dict[Path, int] = {}

    def poll(self) -> list[Event]:
        """Return the whole new lines of all files, ordered by time; a line still being written waits."""
        events: list[Event] = []
        for path in sorted(self._folder.glob(self._names)):
            with path.open("rb") as file:
                file.seek(self._offsets.get(path, 0))
                data = file.read()
            end = data.rfind(b"\n") + 1
            self._offsets[path] = self._offsets.get(path, 0) + end
            events.extend(_parse(data[:end]))
        return sorted(events, key=lambda event: float(event["t"]))


def read_events(folder: Path) -> list[Event]:
    """Return all events under `folder`, ordered by time; lines cut short by a crash are left out."""
    return EventReader(folder).poll()


def _parse(data: bytes) -> Iterator[Event]:
    for line in data.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue  # a line torn by kill -9; whatever follows it is whole
        if isinstance(event, dict) and isinstance(event.get("t"), int | float) and {"source", "kind"} <= event.keys():
            yield event


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _last_time(path: Path) -> float:
    """Of the newest event in a file; 0 if there is none."""
    if not path.exists():
        return 0.0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        return max((float(event["t"]) for event in _parse(file.read())), default=0.0)


def _end_torn_line(path: Path) -> None:
    """A process killed while writing leaves half a line: end it, so that the next event has a line of its own."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb+") as file:
        file.seek(-1, 2)
        if file.read(1) != b"\n":
            file.write(b"\n")
