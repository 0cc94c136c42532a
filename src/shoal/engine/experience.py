"""What a run has learned of its machines, as plain JSON: kept in checkpoints, and told to whoever comes into a view."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shoal.engine.checkpoint.cadence import Cadence
from shoal.engine.division import Division

KEY = "experience"
"""Where it stands in a checkpoint's state."""


@dataclass(frozen=True, kw_only=True)
class Experience:
    """What was learned.

    Attributes:
        speeds: of each seat, see `Division.known`.
        cadence: what checkpoints cost and how often nodes failed, see `Cadence.state_dict`; None: nothing is known.
    """

    speeds: Mapping[str, Any] = field(default_factory=dict)
    cadence: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, division: Division, cadence: Cadence | None) -> Experience:
        """What these have learned."""
        return cls(speeds=division.known, cadence=cadence.state_dict() if cadence is not None else None)

    @classmethod
    def from_state(cls, state: Mapping[str, Any] | None) -> Experience:
        """What a checkpoint's state tells."""
        return cls(**(state or {}).get(KEY, {}))

    def speeds_of(self, num_ranks: int) -> Mapping[str, Any]:
        """Those of so many ranks whose seats are their numbers; of another number of ranks nothing is known."""
        return self.speeds if len(self.speeds) == num_ranks else {}

    def to_plain(self) -> dict[str, Any]:
        """The inverse of construction by keywords."""
        return {"speeds": dict(self.speeds), "cadence": dict(self.cadence) if self.cadence is not None else None}
