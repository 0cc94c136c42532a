"""What a run has done so far, as plain values, and as one JSON object. `folding.py` makes it of the event log.

A resumed run has several attempts, and the steps after its last checkpoint ran twice. The curves keep the occurrence
that the model's weights come from, which is the later one. Time and bytes that were really spent count in full:
`seconds` is training time summed over attempts, without the gap in which the run was dead.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from shoal.dashboard.members import Members
from shoal.dashboard.records import Checkpoint, CurvePoint, Failure, Note, RankHistory, ValidationPoint
from shoal.events import Event


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


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None
