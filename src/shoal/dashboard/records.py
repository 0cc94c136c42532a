"""The plain values a history is made of: one record for each thing that happened in a run."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

RECENT_STEPS = 50


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One step as rank 0 saw it; `samples` and `bytes_sent` (by rank 0) are sums up to this step."""

    step: int
    epoch: float | None
    seconds: float
    samples: int
    bytes_sent: int
    loss: float | None
    lr: float | None
    step_s: float
    step_samples: int


@dataclass(frozen=True, slots=True)
class ValidationPoint:
    """One validation: `seconds` since the start of training, `duration_s` that it took itself."""

    step: int
    seconds: float
    loss: float | None
    metrics: dict[str, float | None]
    best: bool
    duration_s: float


@dataclass(slots=True)
class Breakdown:
    """Where step time went, in seconds; `other_s` is what the named parts leave of `step_s`."""

    data_s: float = 0.0
    compute_s: float = 0.0
    wait_s: float = 0.0
    optimizer_s: float = 0.0
    other_s: float = 0.0
    bytes_sent: int = 0

    @property
    def total_s(self) -> float:
        """The sum of the parts."""
        return self.data_s + self.compute_s + self.wait_s + self.optimizer_s + self.other_s

    def parts(self) -> dict[str, float]:
        """Seconds by the name of the part, in the order in which they are shown."""
        return {
            "data": self.data_s,
            "compute": self.compute_s,
            "wait": self.wait_s,
            "optimizer": self.optimizer_s,
            "other": self.other_s,
        }

    def add(self, other: Breakdown) -> None:
        """Add the times and bytes of `other` to this one."""
        self.data_s += other.data_s
        self.compute_s += other.compute_s
        self.wait_s += other.wait_s
        self.optimizer_s += other.optimizer_s
        self.other_s += other.other_s
        self.bytes_sent += other.bytes_sent


@dataclass(slots=True)
class RankHistory:
    """What one rank did, over all attempts; `recent` holds its last steps one by one."""

    rank: int
    node: str = ""
    device: str = ""
    steps: int = 0
    samples: int = 0
    total: Breakdown = field(default_factory=Breakdown)
    recent: deque[Breakdown] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
    bytes_sent: int = 0
    bytes_before: int = 0  # `bytes_sent` when this attempt began
    peak_memory_bytes: int | None = None

    def recent_total(self) -> Breakdown:
        """The sum over the last steps (at most `RECENT_STEPS`)."""
        total = Breakdown()
        for step in self.recent:
            total.add(step)
        return total


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One checkpoint that was written; `stall_s` is how long training stood still for it."""

    step: int
    seconds: float
    path: str
    size_bytes: int
    stall_s: float
    write_s: float


@dataclass(slots=True)
class Note:
    """A warning; the same message again only raises `count`."""

    message: str
    source: str
    seconds: float
    count: int = 1


@dataclass(frozen=True, slots=True)
class Failure:
    """One rank's error; a `symptom` is another rank's failure as it showed here."""

    source: str
    step: int | None
    seconds: float
    error: str
    message: str
    traceback: str
    symptom: bool
