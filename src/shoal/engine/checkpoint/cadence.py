"""When the next checkpoint is due, where the plan leaves that to measurements.

`interval` says how far apart checkpoints should be; here its numbers are gathered. One rank, which writes, asks whether
a checkpoint is due, and all follow it; the others keep count too, so that any of them can take its place. The first
checkpoint is made early, since nothing but one tells what one costs.
"""

from __future__ import annotations

import statistics
from collections import deque
from typing import Any, Protocol

from shoal.engine.checkpoint.interval import Interval, IntervalConfig

FIRST_STEPS = 10
"""Steps before the first checkpoint: their usual time is known then."""
_REMEMBERED = 9


class Writing(Protocol):
    """Who writes checkpoints."""

    @property
    def is_writing(self) -> bool:
        """Whether one is being written."""

    def take_cost(self) -> tuple[float, float] | None:
        """(seconds that training stood still, seconds of writing) of one written since the last call."""


class Tell(Protocol):
    """Told of every new interval."""

    def __call__(self, *, steps: int, cost_s: float, mtbf_s: float) -> None:
        """`steps` from now on, since a checkpoint costs that and failures come that often."""


class Cadence:
    """Holds no clock: seconds are given."""

    def __init__(
        self, num_nodes: int, last_step: int, *, config: IntervalConfig | None = None, tell: Tell | None = None
    ) -> None:
        """Begin.

        Args:
            num_nodes: that train together.
            last_step: of the newest checkpoint.
        """
        self._num_nodes = num_nodes
        self._last_step = last_step
        self._interval = Interval(config)
        self._tell = tell
        self._steps: int | None = None
        self._quiet_s: deque[float] = deque(maxlen=_REMEMBERED)
        self._busy_s: deque[float] = deque(maxlen=_REMEMBERED)

    def is_due(self, step: int) -> bool:
        """Whether there should be a checkpoint after this step."""
        return step - self._last_step >= (self._steps or FIRST_STEPS)

    def begun(self, step: int) -> None:
        """A checkpoint of this step was begun, for whatever reason."""
        self._last_step = step

    def stepped(self, seconds: float, writing: Writing) -> None:
        """Count a step that took so many seconds, and a checkpoint that was written meanwhile."""
        self._interval.trained(seconds, 1, self._num_nodes)
        (self._busy_s if writing.is_writing else self._quiet_s).append(seconds)
        cost = writing.take_cost()
        if cost is not None:
            self._interval.saved(*cost, slowdown=self._slowdown())
            self._reckon()

    def lost(self, num_nodes: int) -> None:
        """Count that so many nodes failed at once."""
        self._interval.failed(num_nodes)
        if num_nodes and self._steps is not None:
            self._reckon()

    def state_dict(self) -> dict[str, Any]:
        """What is worth keeping for another view or after a restart, as plain JSON."""
        return {"last_step": self._last_step, "steps": self._steps, "interval": self._interval.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`; to be called once, at the beginning."""
        self._last_step, self._steps = state["last_step"], state["steps"]
        self._interval.load_state_dict(state["interval"])

    def _slowdown(self) -> float:
        """The part of its speed that training loses while a checkpoint is written."""
        if not self._busy_s or not self._quiet_s:
            return 0.0
        busy_s = statistics.median(self._busy_s)
        return max(0.0, 1 - statistics.median(self._quiet_s) / busy_s) if busy_s > 0 else 0.0

    def _reckon(self) -> None:
        before, self._steps = self._steps, self._interval.steps
        cost_s = self._interval.cost_s
        if self._tell is not None and self._steps is not None and cost_s is not None and self._steps != before:
            self._tell(steps=self._steps, cost_s=cost_s, mtbf_s=self._interval.mtbf_s)
