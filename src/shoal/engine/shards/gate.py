"""Before an update every rank waits until all have what they need for it.

So of a replica's ranks none takes a step that another cannot take: who is past the gate knows that all were at it. A
rank that a loss stops in the gate keeps its gradient, and takes the update if it turns out that another did.
"""

from __future__ import annotations

from shoal.engine.progress import Progress
from shoal.engine.shards.copies import Copies
from shoal.engine.shards.held import Live
from shoal.errors import PeerLostError
from shoal.wire.groups import World


class Gate:
    """One view's."""

    def __init__(self, world: World, live: Live, copies: Copies | None) -> None:
        """`copies`: about which the ranks tell each other here, too."""
        self._world = world
        self._live = live
        self._copies = copies

    def enter(self, reached: Progress) -> None:
        """The gradient is there: go on when all have theirs. Collective.

        Args:
            reached: how far the update leads.

        Raises:
            PeerLostError: a rank vanished; the update may be taken later.
        """
        has_copies = self._copies is not None and self._copies.has_arrived
        try:
            [count] = self._world.sum([float(has_copies)])
        except PeerLostError:
            self._live.keep_update(reached)
            raise
        if self._copies is not None and count == self._world.size:
            self._copies.settle()
