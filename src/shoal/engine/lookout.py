"""Names the ranks that are slow, and why; by choice, one that stays far too slow leaves by itself.

Every rank sees the same measurements, so all name the same ranks and agree on who leaves; who is a member is decided
elsewhere. How slowness is judged is `data.slowness`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shoal.data.slowness import Slow, Timing, Watch
from shoal.engine.division import Measured
from shoal.events import EventLog


@dataclass(frozen=True, kw_only=True)
class LookoutConfig:
    """What is done about slow ranks.

    Attributes:
        rank: this one; rank 0 tells.
        nodes: each rank's.
        leave_out_slower_than: a rank that is lastingly slower than a usual one by this factor leaves; 0: none does.
        min_ranks: so many stay.
    """

    rank: int
    nodes: tuple[str, ...]
    leave_out_slower_than: float = 0.0
    min_ranks: int = 0


class Lookout:
    """Watches the ranks of one view."""

    def __init__(self, config: LookoutConfig, log: EventLog, leave: Callable[[], None]) -> None:
        """`leave`: asks for this rank's own orderly leave."""
        self._config = config
        self._log = log
        self._leave = leave
        self._watch = Watch(len(config.nodes))
        self._is_leaving = False

    def look(self, step: int, measured: Measured) -> None:
        """Take what was measured in step `step`."""
        columns = zip(measured.samples, measured.data_s, measured.compute_s, strict=True)
        timings = [Timing(samples=n if compute > 0 else 0, data_s=d, compute_s=compute) for n, d, compute in columns]
        news = self._watch.observe(step, timings)
        if self._config.rank == 0:
            for slow in news:
                self._tell(slow)
        if news and not self._is_leaving and self._config.rank in leavers(self._watch.slow, self._config):
            self._is_leaving = True
            [own] = [slow for slow in self._watch.slow if slow.rank == self._config.rank]
            self._log.write(
                "warning",
                message=f"this rank takes {own.factor:.1f} times as long as usual (at {own.cause}), and leaves, as "
                f"elastic.leave_out_slower_than = {self._config.leave_out_slower_than:g} asks",
            )
            self._leave()

    def _tell(self, slow: Slow) -> None:
        self._log.write(
            "slow",
            rank=slow.rank,
            node=self._config.nodes[slow.rank],
            cause=slow.cause,
            factor=slow.factor,
            since_step=slow.since_step,
            persistent=slow.persistent,
            until_step=slow.until_step,
        )


def leavers(slow: Sequence[Slow], config: LookoutConfig) -> list[int]:
    """The ranks that should leave, the slowest first: no more than can be spared."""
    bound, spare = config.leave_out_slower_than, max(0, len(config.nodes) - config.min_ranks)
    found = [one for one in slow if bound and one.persistent and one.factor > bound]
    return [one.rank for one in sorted(found, key=lambda one: (-one.factor, one.rank))[:spare]]
