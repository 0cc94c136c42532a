"""A newcomer follows the others before it has their state, so that nobody waits for it.

It takes part in every exchange with an empty share, and keeps what all have summed. When the state of the step at which
it came has arrived, it takes the steps since then one after the other, with the gradients that it kept: its optimizer
does the same arithmetic as everybody's, so it then holds the same bits. After that it is given a share.
"""

from __future__ import annotations

from torch import Tensor

from shoal.engine.build import Parts
from shoal.engine.exchange.gradients import GradientExchange
from shoal.engine.views.travelling import Taking

_MOST_STEPS = 64  # kept, each as large as the gradient; then training waits for the state


class Newcomer:
    """One rank on its way in."""

    def __init__(self, taking: Taking, parts: Parts, exchange: GradientExchange) -> None:
        self._taking = taking
        self._parts = parts
        self._exchange = exchange
        self._kept: list[list[Tensor]] = []

    def keep(self) -> None:
        """A step was exchanged and clipped, and waits for this rank's parameters."""
        self._kept.append(self._exchange.reduced())

    @property
    def can_catch_up(self) -> bool:
        """Whether the state is there, or as much is kept as may be."""
        return self._taking.has_arrived or len(self._kept) >= _MOST_STEPS

    def catch_up(self) -> int:
        """Take the state and all steps that were kept; return how many.

        Raises:
            PeerLostError: the state never came.
        """
        self._taking.wait()
        self._taking.install(self._parts)
        for copy in self._kept:
            self._exchange.install_reduced(copy)
            self._parts.optimizer.step()
            if self._parts.schedule is not None:
                self._parts.schedule.step()
        self._parts.replica.clear_gradients()
        return len(self._kept)
