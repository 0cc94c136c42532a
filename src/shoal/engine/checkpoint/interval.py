"""How often to write a checkpoint: seldom enough that writing costs little, often enough that a failure does.

The interval is that of J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps",
Future Generation Computer Systems 22 (2006) 303-312, which improves on the square root of J. W. Young, "A first order
approximation to the optimum checkpoint interval", Communications of the ACM 17 (1974) 530-531.

What a checkpoint costs is measured. How often nodes fail is counted, on top of what is assumed until more is known: the
estimate is the mean of a Poisson process's rate under a gamma prior. Assumptions: failures are independent and arrive
at a constant rate, every one of them ends the step for all nodes, and a restart costs the same whatever the interval.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field

from shoal.strict_toml import STRICT

_REMEMBERED = 9
"""Checkpoints and steps of which the median is taken."""


def interval_s(cost_s: float, mtbf_s: float) -> float:
    """Return Daly's optimum: seconds of training between the end of a checkpoint and the beginning of the next.

    Args:
        cost_s: seconds of training that one checkpoint costs, at least 0.
        mtbf_s: mean time between failures of everything that trains together, above 0.
    """
    if cost_s >= 2 * mtbf_s:
        return mtbf_s
    part = cost_s / (2 * mtbf_s)
    return math.sqrt(2 * cost_s * mtbf_s) * (1 + math.sqrt(part) / 3 + part / 9) - cost_s


@dataclass(frozen=True, kw_only=True)
class IntervalConfig:
    """What is assumed until more is known, and the bounds.

    Attributes:
        failures, node_hours: failures that count as seen already, and the node-hours in which they were seen.
        min_steps, max_steps: bounds of the interval; None is no upper bound.
    """

    __pydantic_config__: ClassVar = STRICT
    failures: Annotated[float, Field(gt=0)] = 1.0
    node_hours: Annotated[float, Field(gt=0)] = 24.0
    min_steps: Annotated[int, Field(ge=1)] = 1
    max_steps: Annotated[int, Field(ge=1)] | None = None


class Interval:
    """Steps between two checkpoints, from what was measured so far.

    It is the same on every rank if all feed the same numbers.
    """

    def __init__(self, config: IntervalConfig | None = None) -> None:
        self._config = config or IntervalConfig()
        self._num_nodes = 1
        self._node_s = 0.0
        self._failures = 0
        self._steps: deque[float] = deque(maxlen=_REMEMBERED)
        self._costs: deque[float] = deque(maxlen=_REMEMBERED)
        self._writing: deque[float] = deque(maxlen=_REMEMBERED)

    def trained(self, seconds: float, steps: int, num_nodes: int) -> None:
        """Count time without a checkpoint: `steps` steps in `seconds`, on `num_nodes` nodes."""
        self._num_nodes = num_nodes
        self._node_s += seconds * num_nodes
        if steps > 0:
            self._steps.append(seconds / steps)

    def saved(self, stall_s: float, background_s: float = 0.0, slowdown: float = 0.0) -> None:
        """Count a checkpoint.

        Args:
            stall_s: how long training stood still for it.
            background_s: how long it was written after that, while training went on.
            slowdown: the part of its speed, 0 to 1, that training lost meanwhile.
        """
        self._costs.append(stall_s + slowdown * background_s)
        self._writing.append(background_s)

    def failed(self, nodes: int = 1) -> None:
        """Count that so many nodes were lost at once: one failure, since it costs one restart."""
        if nodes > 0:
            self._failures += 1

    @property
    def mtbf_s(self) -> float:
        """The mean time between failures of all nodes together."""
        node_s = self._config.node_hours * 3600 + self._node_s
        return node_s / (self._config.failures + self._failures) / self._num_nodes

    @property
    def cost_s(self) -> float | None:
        """Seconds of training that a checkpoint costs; None before the first one."""
        return statistics.median(self._costs) if self._costs else None

    @property
    def steps(self) -> int | None:
        """Steps between two checkpoints, within the bounds; None until a step and a checkpoint have been measured."""
        if self.cost_s is None or not self._steps:
            return None
        step_s = max(statistics.median(self._steps), 1e-9)
        # A checkpoint cannot begin before the last one is written: it would be waited for.
        seconds = max(interval_s(self.cost_s, self.mtbf_s), statistics.median(self._writing))
        most = self._config.max_steps
        steps = max(self._config.min_steps, math.ceil(seconds / step_s))
        return steps if most is None else min(steps, most)

    def state_dict(self) -> dict[str, Any]:
        """What is worth keeping over a restart, as plain JSON."""
        return {
            "node_s": self._node_s,
            "failures": self._failures,
            "steps": list(self._steps),
            "costs": list(self._costs),
            "writing": list(self._writing),
            "num_nodes": self._num_nodes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self._node_s, self._failures = state["node_s"], state["failures"]
        self._num_nodes = state["num_nodes"]
        self._steps.extend(state["steps"])
        self._costs.extend(state["costs"])
        self._writing.extend(state["writing"])
