"""Each sample once an epoch, the same content wherever and whenever it is fetched, and from any place onwards."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset

from shoal.data.loader import Batch, Cursor, Loader, LoaderConfig, num_samples, ordered_batches
from shoal.data.order import shuffled
from shoal.errors import JobError


class Noisy(Dataset[tuple[int, Tensor]]):
    """The index, and one draw from each of the generators that an augmentation may use."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return index, torch.tensor([torch.rand(()).item(), random.random(), np.random.rand()])


def noisy_collate(samples: list[tuple[int, Tensor]]) -> list[Any]:
    """The samples, and one draw from each generator for all of them."""
    drawn = torch.tensor([torch.rand(()).item(), random.random(), np.random.rand()])
    return [[index for index, _ in samples], torch.stack([noise for _, noise in samples]), drawn]


def config(**changes: Any) -> LoaderConfig:
    given = {
        "seed": 4, "batch_size": 6, "shares": (1.0, 1.0), "accumulate": 1,
        "shuffle": True, "drop_last": False, "num_workers": 0, "pin_memory": False,
    }  # fmt: skip
    return LoaderConfig(**(given | changes))


def take(settings: LoaderConfig, size: int, count: int, start: Cursor | None = None) -> list[list[Batch]]:
    """The next `count` batches of every rank."""
    return [
        list(itertools.islice(Loader(Noisy(size), settings, rank, noisy_collate).batches(start or Cursor()), count))
        for rank in range(len(settings.shares))
    ]


def indices(batch: Batch) -> list[int]:
    return [index for _, (found, _, _) in batch.micro_batches for index in found]


shares = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.7]), min_size=1, max_size=4).filter(any).map(tuple)


@given(
    size=st.integers(1, 40),
    batch_size=st.integers(1, 13),
    shares=shares,
    accumulate=st.integers(1, 4),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
)
def test_over_all_ranks_an_epoch_holds_each_sample_once_in_the_order_that_one_process_has(
    size: int, batch_size: int, shares: tuple[float, ...], accumulate: int, shuffle: bool, drop_last: bool
) -> None:
    settings = config(batch_size=batch_size, shares=shares, accumulate=accumulate, shuffle=shuffle, drop_last=drop_last)
    loaders = [Loader(Noisy(size), settings, rank, noisy_collate) for rank in range(len(shares))]
    steps = loaders[0].steps_per_epoch
    assert steps == (size // batch_size if drop_last else -(-size // batch_size))
    if steps == 0:
        return
    for epoch in range(2):
        positions = np.arange(size)
        order = list(shuffled(positions, size, seed=settings.seed, epoch=epoch)) if shuffle else list(positions)
        for step in range(steps):
            turns = [next(iter_turns(loader, Cursor(epoch, step))) for loader in loaders]
            fetched = [place for turn in turns for micro_batch in turn for place in micro_batch]
            assert fetched == [order[p] for p in range(size)][step * batch_size : (step + 1) * batch_size]
            assert all(len(turn) <= accumulate for turn in turns)


def iter_turns(loader: Loader, cursor: Cursor) -> Any:
    """This rank's micro-batches of one step, as indices, without fetching anything."""
    turns = loader.turns(cursor)
    yield [[place for place, _ in next(turns)] for span in loader.micro_spans(cursor) if span]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_batches_hold_what_the_turns_say(world_size: int) -> None:
    settings = config(shares=(1.0,) * world_size, accumulate=2)
    ranks = take(settings, size=20, count=8)  # two epochs of four batches, the last of 2 samples
    seen = Counter(index for batches in ranks for batch in batches for index in indices(batch))
    assert seen == Counter(dict.fromkeys(range(20), 2))
    for step, batches in enumerate(zip(*ranks, strict=True)):
        assert sum(batch.share for batch in batches) == batches[0].size == (2 if step % 4 == 3 else 6)
        for batch in batches:
            assert batch.cursor == Cursor(step // 4, step % 4)
            assert batch.after == Cursor((step + 1) // 4, (step + 1) % 4)
            assert all(count == len(found) > 0 for count, (found, _, _) in batch.micro_batches)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("start", [0, 1, 3, 4, 6])
def test_from_any_place_on_it_is_the_tail_of_the_whole(start: int, num_workers: int) -> None:
    whole = take(config(), size=20, count=8)
    tail = take(config(num_workers=num_workers), size=20, count=8 - start, start=whole[0][start].cursor)
    for rank in (0, 1):
        assert_same_batches(tail[rank], whole[rank][start:])


def assert_same_batches(some: list[Batch], others: list[Batch]) -> None:
    """Equal in every index, every augmentation and every draw of the collate function."""
    assert [batch.cursor for batch in some] == [batch.cursor for batch in others]
    for one, other in zip(some, others, strict=True):
        for (count, (found, noise, drawn)), (count2, (found2, noise2, drawn2)) in zip(
            one.micro_batches, other.micro_batches, strict=True
        ):
            assert (count, found) == (count2, found2)
            assert torch.equal(noise, noise2)
            assert torch.equal(drawn, drawn2)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_augmentation_depends_on_neither_ranks_nor_workers_nor_micro_batches(num_workers: int) -> None:
    def noise_of(settings: LoaderConfig) -> dict[tuple[int, int], list[float]]:
        return {
            (batch.cursor.epoch, index): noise.tolist()
            for batches in take(settings, size=20, count=8)
            for batch in batches
            for _, (found, rows, _) in batch.micro_batches
            for index, noise in zip(found, rows, strict=True)
        }

    alone = noise_of(config(shares=(1.0,)))
    assert noise_of(config(shares=(1.0, 3.0, 2.0), accumulate=2, num_workers=num_workers)) == alone
    assert len({tuple(noise) for noise in alone.values()}) == 40  # another in each epoch


def test_loading_draws_nothing_from_the_generators_of_training() -> None:
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    take(config(), size=20, count=5)
    list(ordered_batches(Noisy(7), range(7), 3, noisy_collate))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]


def test_another_seed_gives_another_order_and_other_augmentations() -> None:
    one, other = (take(config(seed=seed, shares=(1.0,)), size=20, count=4)[0] for seed in (1, 2))
    assert [indices(batch) for batch in one] != [indices(batch) for batch in other]


def test_a_cursor_at_the_end_of_an_epoch_is_the_start_of_the_next() -> None:
    (batch,) = take(config(shares=(1.0,)), size=20, count=1, start=Cursor(0, 4))[0]
    assert batch.cursor == Cursor(1, 0)


@pytest.mark.parametrize("span", [range(0), range(7), range(3, 10)])
def test_validation_data_come_in_their_own_order_in_pieces(span: range) -> None:
    pieces = list(ordered_batches(Noisy(10), span, 3, noisy_collate))
    assert [index for _, (found, _, _) in pieces for index in found] == list(span)
    assert all(count == len(found) <= 3 for count, (found, _, _) in pieces)


def test_pytorchs_own_collating_is_the_default() -> None:
    (batch,) = itertools.islice(Loader(Noisy(8), config(shares=(1.0,)), 0, None).batches(Cursor()), 1)
    ((count, (found, noise)),) = batch.micro_batches
    assert count == len(found) == len(noise) == 6
    assert isinstance(found, Tensor)


def test_data_without_a_length_are_refused() -> None:
    class Stream:
        pass

    with pytest.raises(JobError, match="Stream without a length; expected a map-style dataset"):
        num_samples(Stream())  # type: ignore[arg-type]
