"""What a rank asks for in the vote of each step, to stop and to turn to the next view; and what it tells in return.

Set from other threads (signals, the launcher's word, the coordinator's), read by the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from shoal.engine.control import StopRequest


def _never() -> bool:
    return False


def _stay() -> None:
    pass


@dataclass(frozen=True)
class Turnover:
    """A rank's wishes.

    Attributes:
        stop: somebody asked this rank to stop.
        is_ready: whether this rank could go on in the next view at once.
        committed: told the number of steps after each.
        leave: called by a rank that should train no more with the others; nothing where ranks do not come and go.
    """

    stop: StopRequest
    is_ready: Callable[[], bool] = field(default=_never)
    committed: Callable[[int], None] = field(default=lambda step: None)
    leave: Callable[[], None] = field(default=_stay)
