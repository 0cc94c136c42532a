"""What a rank asks for in the vote of each step: to stop, and to turn to the next view.

Set from other threads (signals, the launcher's word, the coordinator's), read by the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from shoal.engine.control import StopRequest


def _never() -> bool:
    return False


@dataclass(frozen=True)
class Turnover:
    """A rank's wishes.

    Attributes:
        stop: somebody asked this rank to stop.
        is_ready: whether this rank could go on in the next view at once.
        committed: told the number of steps after each.
    """

    stop: StopRequest
    is_ready: Callable[[], bool] = field(default=_never)
    committed: Callable[[int], None] = field(default=lambda step: None)
