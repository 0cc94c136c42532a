"""Which parts of a round a server's values have learned from, where workers come and go at their own pace.

An update in mode async carries, in place of a clock, the number of the part that it came from. A part counts when every
key of the server has its update: so of a worker that is lost, what arrived whole is known, and the rest can be leased
again.
"""

from __future__ import annotations

from collections import Counter


class Ledger:
    """One server's; what lies before the round at hand is forgotten."""

    def __init__(self) -> None:
        self._keys_done: Counter[int] = Counter()

    def note(self, part: int) -> None:
        """One key has an update of `part` that it had not before."""
        self._keys_done[part] += 1

    def whole(self, first: int, num_keys: int) -> list[int]:
        """The parts from `first` on that all `num_keys` keys have learned from. Earlier ones are forgotten."""
        self._keys_done = Counter({part: count for part, count in self._keys_done.items() if part >= first})
        return sorted(part for part, count in self._keys_done.items() if count >= num_keys)
