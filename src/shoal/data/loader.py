"""Feeds one rank its share of every global batch, from any position, for ever.

A map-style dataset stands behind PyTorch's own DataLoader (its workers, its pinning, its collating); what is added is
whose turn each sample is: the order is `order.py`'s, the division `partition.py`'s. What a dataset draws at random (an
augmentation) is seeded by the sample's place in the order, so it depends on neither ranks, workers nor restarts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from shoal.data.order import sample_seeds, shuffled
from shoal.data.partition import spans, steps_per_epoch
from shoal.errors import JobError

Collate = Callable[[list[Any]], Any]


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """What the loader needs of the plan.

    Attributes:
        batch_size: samples of a global batch.
        shares: each rank's weight; only proportions count.
        shards: so many consecutive ranks compute one replica together, and need as many micro-batches as each other.
        accumulate: micro-batches a step, on each rank.
        num_workers: DataLoader worker processes a rank; 0 loads in the training process.
    """

    seed: int
    batch_size: int
    shares: tuple[float, ...]
    accumulate: int
    shuffle: bool
    drop_last: bool
    num_workers: int
    pin_memory: bool
    shards: int = 1


@dataclass(frozen=True)
class Cursor:
    """A place in the data: the step within an epoch."""

    epoch: int = 0
    step: int = 0


@dataclass(frozen=True)
class Batch:
    """One rank's part of one global batch.

    Attributes:
        cursor: which batch this is.
        size: samples in the global batch.
        micro_batches: (number of samples, collated samples). Empty ones are left out, unless another rank of the same
            replica has more: then they count 0 and hold a sample that is another rank's.
        replica_share: samples of this rank's replica.
        first: the global batch's first position in the epoch's order; it takes `size` of them.
        after: where the next batch stands.
    """

    cursor: Cursor
    size: int
    micro_batches: list[tuple[int, Any]]
    after: Cursor
    replica_share: int
    first: int = 0

    @property
    def share(self) -> int:
        """This rank's samples."""
        return sum(count for count, _ in self.micro_batches)


class _Sample(NamedTuple):
    place: int
    seed: int


class Loader:
    """The endless stream of one rank's batches."""

    def __init__(self, dataset: Dataset[Any], config: LoaderConfig, rank: int, collate: Collate | None) -> None:
        self._dataset = dataset
        self._config = config
        self._rank = rank
        self._collate = collate
        self.num_samples = num_samples(dataset)
        self.steps_per_epoch = steps_per_epoch(self.num_samples, config.batch_size, drop_last=config.drop_last)

    def batches(self, start: Cursor) -> Iterator[Batch]:
        """Yield every batch from `start` on, epoch after epoch, without end."""
        config = self._config
        samples = DataLoader(
            _Seeded(self._dataset),
            batch_sampler=_Turns(self, start),
            num_workers=config.num_workers,
            collate_fn=_SeededCollate(self._collate),
            pin_memory=config.pin_memory,
            persistent_workers=config.num_workers > 0,
            generator=torch.Generator(),  # its own: the loader must not draw from training's
        )
        feed = iter(samples)
        for cursor in self._cursors(start):
            pieces = [(count, next(feed)) for count, _ in self._turns(cursor, self._rank)]
            yield self._batch(cursor, self._rank, pieces)

    def divided(self, shares: tuple[float, ...], rank: int | None = None) -> Loader:
        """The same data, divided otherwise: for rank `rank` (default: this one) of as many as there are `shares`."""
        config = dataclasses.replace(self._config, shares=shares)
        return Loader(self._dataset, config, self._rank if rank is None else rank, self._collate)

    def part(self, cursor: Cursor, slot: int) -> Batch:
        """The part of one global batch that is rank `slot`'s by its share, fetched here and now by whoever asks."""
        fetch, collate = _Seeded(self._dataset), _SeededCollate(self._collate)
        turns = self._turns(cursor, slot)
        pieces = [(count, collate(fetch.__getitems__(self._samples(cursor, turn)))) for count, turn in turns]
        return self._batch(cursor, slot, pieces)

    def after(self, cursor: Cursor, steps: int) -> tuple[Cursor, int]:
        """Where `steps` global batches lead from `cursor`, and how many samples lie between."""
        samples = 0
        cursor = self._wrap(cursor)
        for _ in range(steps):
            samples += self._batch_size(cursor)
            cursor = self._next(cursor)
        return cursor, samples

    def turns(self, start: Cursor) -> Iterator[list[_Sample]]:
        """The samples of every micro-batch of this rank, from `start` on."""
        for cursor in self._cursors(start):
            for _, turn in self._turns(cursor, self._rank):
                yield self._samples(cursor, turn)

    def micro_spans(self, cursor: Cursor, slot: int | None = None) -> list[range]:
        """The micro-batches of rank `slot` (default: this one), as ranges of position within the epoch."""
        size = self._batch_size(cursor)
        mine = spans(size, self._config.shares)[self._rank if slot is None else slot]
        first = cursor.step * self._config.batch_size + mine.start
        pieces = spans(len(mine), [1.0] * self._config.accumulate)
        return [range(first + piece.start, first + piece.stop) for piece in pieces]

    def _turns(self, cursor: Cursor, slot: int) -> list[tuple[int, range]]:
        """(samples that count, positions) for each micro-batch of rank `slot`: see `Batch.micro_batches`."""
        filled = {peer: [turn for turn in self.micro_spans(cursor, peer) if turn] for peer in self._replica(slot)}
        first = cursor.step * self._config.batch_size
        missing = max(map(len, filled.values())) - len(filled[slot])
        return [(len(turn), turn) for turn in filled[slot]] + [(0, range(first, first + 1))] * missing

    def _replica(self, slot: int) -> range:
        first = slot - slot % self._config.shards
        return range(first, first + self._config.shards)

    def _batch(self, cursor: Cursor, slot: int, pieces: list[tuple[int, Any]]) -> Batch:
        size = self._batch_size(cursor)
        mine = spans(size, self._config.shares)
        total = sum(len(mine[peer]) for peer in self._replica(slot))
        first = cursor.step * self._config.batch_size
        return Batch(cursor, size, pieces, self._next(cursor), total, first)

    def _cursors(self, start: Cursor) -> Iterator[Cursor]:
        cursor = self._wrap(start)
        while True:
            yield cursor
            cursor = self._next(cursor)

    def _next(self, cursor: Cursor) -> Cursor:
        return self._wrap(dataclasses.replace(cursor, step=cursor.step + 1))

    def _wrap(self, cursor: Cursor) -> Cursor:
        return Cursor(cursor.epoch + 1, 0) if cursor.step >= self.steps_per_epoch else cursor

    def _batch_size(self, cursor: Cursor) -> int:
        return min(self._config.batch_size, self.num_samples - cursor.step * self._config.batch_size)

    def _samples(self, cursor: Cursor, turn: range) -> list[_Sample]:
        positions = np.arange(turn.start, turn.stop, dtype=np.int64)
        seed, epoch = self._config.seed, cursor.epoch
        seeds = sample_seeds(positions, seed=seed, epoch=epoch)
        indices = positions
        if self._config.shuffle:
            indices = shuffled(positions, self.num_samples, seed=seed, epoch=epoch)
        return [_Sample(int(i), int(s)) for i, s in zip(indices, seeds, strict=True)]


def num_samples(dataset: Dataset[Any]) -> int:
    """The length of a map-style dataset.

    Raises:
        JobError: it has none.
    """
    try:
        return len(dataset)  # type: ignore[arg-type]
    except TypeError:
        raise JobError(
            f"the job's data is a {type(dataset).__name__} without a length; expected a map-style dataset "
            "(__len__ and __getitem__)"
        ) from None


class _Turns:
    """The DataLoader's batch sampler: nothing but `Loader.turns`."""

    def __init__(self, loader: Loader, start: Cursor) -> None:
        self._loader = loader
        self._start = start

    def __iter__(self) -> Iterator[list[_Sample]]:
        return self._loader.turns(self._start)


class _Fetched(list[Any]):
    """The samples of one micro-batch, on their way to be collated; `seed` is the first one's."""

    def __init__(self, samples: list[Any], seed: int) -> None:
        super().__init__(samples)
        self.seed = seed


class _Seeded(Dataset[Any]):
    """Seeds the random generators for each sample by its place in the order."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self._dataset = dataset

    def __getitems__(self, samples: Sequence[_Sample]) -> _Fetched:
        with _generators_kept():
            return _Fetched([self._fetch(sample) for sample in samples], samples[0].seed)

    def __getitem__(self, sample: _Sample) -> Any:
        return self._fetch(sample)

    def _fetch(self, sample: _Sample) -> Any:
        _seed_generators(sample.seed)
        return self._dataset[sample.place]


class _SeededCollate:
    """The same for what a collate function draws."""

    def __init__(self, collate: Collate | None) -> None:
        self._collate = collate or default_collate

    def __call__(self, samples: list[Any]) -> Any:
        assert isinstance(samples, _Fetched)
        with _generators_kept():
            _seed_generators(~samples.seed)
            return self._collate(list(samples))


@contextlib.contextmanager
def _generators_kept() -> Iterator[None]:
    """Put the random generators back afterwards: training draws from them too."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


def _seed_generators(seed: int) -> None:
    seed &= 0xFFFFFFFFFFFFFFFF
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)


def ordered_batches(
    dataset: Dataset[Any], span: range, batch_size: int, collate: Collate | None
) -> Iterator[tuple[int, Any]]:
    """Yield (number of samples, collated samples) for consecutive pieces of `span`, in the dataset's own order."""
    pieces = [range(start, min(start + batch_size, span.stop)) for start in range(span.start, span.stop, batch_size)]
    sampler = [[_Sample(place, place) for place in piece] for piece in pieces]
    batches = DataLoader(
        _Seeded(dataset), batch_sampler=sampler, collate_fn=_SeededCollate(collate), generator=torch.Generator()
    )
    for piece, samples in zip(pieces, batches, strict=True):
        yield len(piece), samples
