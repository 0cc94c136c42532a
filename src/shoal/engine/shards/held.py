"""What one rank holds between views: its live shard, and copies of its own and of others' from earlier steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.engine.exchange.base import copied
from shoal.engine.progress import Progress
from shoal.engine.shards.choice import Choice, Label, complete
from shoal.engine.shards.shard import Shard, Source


@dataclass(frozen=True)
class _Update:
    """An update that this rank could take, and leaves until it knows whether others took it."""

    reached: Progress
    gradients: list[Tensor | None]
    buffers: dict[str, Tensor]


class Live:
    """This rank's shard as it is trained in one view.

    Attributes:
        progress: committed steps, and what belongs to them.
    """

    def __init__(self, epoch: int, count: int, index: int, source: Source, progress: Progress) -> None:
        """`epoch`: the view's; `count`, `index`: which shard it is."""
        self._epoch, self._count, self._index = epoch, count, index
        self.source = source
        self.progress = progress
        self._update: _Update | None = None

    def label(self, progress: Progress | None = None) -> Label:
        """Its name after so many steps; default: as many as it has."""
        return Label(self._epoch, (progress or self.progress).step, self._count, self._index)

    @property
    def labels(self) -> list[Label]:
        """What it is, and what it could become."""
        if self._update is None:
            return [self.label()]
        ahead = Label(self._epoch, self._update.reached.step, self._count, self._index, is_committed=False)
        return [self.label(), ahead]

    def keep_update(self, reached: Progress) -> None:
        """The last gradient is complete, and whether the others take it is not known: keep what the update needs."""
        gradients = [held.local.grad for held in self.source.replica.held]
        self._update = _Update(
            reached, [None if g is None else g.clone() for g in gradients], copied(dict(self.source.replica.buffers))
        )

    def take_update(self) -> None:
        """Somebody did: all do."""
        assert self._update is not None
        source, update = self.source, self._update
        for held, gradient in zip(source.replica.held, update.gradients, strict=True):
            held.local.grad = gradient
        source.optimizer.step()
        if source.schedule is not None:
            source.schedule.step()
        with torch.no_grad():
            for held in source.replica.held:
                held.local.grad = None
            for name, buffer in source.replica.buffers.items():
                buffer.copy_(update.buffers[name])
        self.progress, self._update = update.reached, None

    def shard(self, progress: Progress | None = None) -> Shard:
        """The tensors as they are now, which are those after `progress`; default: its own."""
        return Shard.of(self.label(progress), self.source, progress or self.progress)


class Holdings:
    """All that one rank holds. While a view forms: the live shard of the view before, and of the new one.

    Attributes:
        copies: in memory, of steps that were; replaced as a whole, from any thread.
    """

    def __init__(self) -> None:
        self._lives: list[Live] = []
        self.copies: tuple[Shard, ...] = ()

    @property
    def labels(self) -> list[Label]:
        """Of everything."""
        return [label for live in self._lives for label in live.labels] + [shard.label for shard in self.copies]

    def add(self, live: Live) -> None:
        """A new view's; the others stay until all ranks have theirs."""
        self._lives.append(live)

    def keep(self, *shards: Shard) -> None:
        """Copies, beside those that are there."""
        self.copies = (*self.copies, *shards)

    def of(self, choice: Choice) -> dict[int, Shard]:
        """This rank's shards of a state, by their place in it."""
        found = {shard.label.index: shard for shard in self.copies if shard.label.key == choice.key}
        for live in self._lives:
            for label in live.labels:
                if label.key != choice.key:
                    continue
                if not label.is_committed:
                    live.take_update()
                found[label.index] = live.shard()
        return found

    def settle(self, told: Sequence[Sequence[Label]], *, needs_copies: bool) -> None:
        """All ranks of the view have a live shard: let go of older ones, and of copies that nobody could go on from.

        Args:
            told: what all ranks held when the view began.
            needs_copies: the loss of one rank could take a shard with it.
        """
        self._lives = self._lives[-1:]
        keys = {shard.label.key for shard in self.copies} if needs_copies else set()
        best = next((choice.key for choice in complete(told) if choice.key in keys), None)
        self.copies = tuple(shard for shard in self.copies if shard.label.key == best)
