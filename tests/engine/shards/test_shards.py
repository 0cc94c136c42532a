"""Shards as plain tensors: divided anew nothing is lost, and an update taken later is the same update."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import AdamW

from shoal.engine.layout.replica import Held, Replica
from shoal.engine.progress import Progress
from shoal.engine.shards.choice import Label
from shoal.engine.shards.held import Holdings, Live
from shoal.engine.shards.shard import Shard, Source
from shoal.strategy.layout.region import Region

SHAPES = {"bias": (5,), "empty": (0, 2), "weight": (7, 3)}


def replica_of(index: int, count: int) -> Replica:
    """A rank's part of three parameters that hold the numbers from 0 on."""
    generator = torch.Generator().manual_seed(3)
    parameters = []
    for name, shape in SHAPES.items():
        region = Region.whole(shape).of_rows(index, count)
        local = nn.Parameter(region.take(torch.randn(shape, generator=generator, dtype=torch.float64)))
        parameters.append(Held(name, local, local, region))
    return Replica(nn.Module(), parameters, buffers={"scale": torch.ones(2)})


def trained(index: int, count: int, steps: int) -> Source:
    """A source after some steps, whose gradients are the values themselves."""
    replica = replica_of(index, count)
    source = Source(replica, AdamW([held.local for held in replica.held], 0.1), None)
    for _ in range(steps):
        step(source)
    return source


def step(source: Source) -> None:
    for held in source.replica.held:
        held.local.grad = held.local.detach().clone()
    source.optimizer.step()


@given(before=st.integers(1, 9), after=st.integers(1, 9))
def test_divided_anew_every_value_is_where_it_belongs(before: int, after: int) -> None:
    old = [Shard.of(Label(1, 2, before, i), trained(i, before, 2), Progress(step=2)) for i in range(before)]
    for index in range(after):
        expected = Shard.of(Label(1, 2, after, index), trained(index, after, 2), Progress(step=2))
        fresh = Shard.empty(Label(2, 2, after, index), old[0].common, replica_of(index, after))
        for values in (*fresh.values.values(), *(t for state in fresh.state.values() for t in state.values())):
            values.fill_(torch.nan)
        for place, shard in enumerate(old):
            sent, room = list(shard.rows(SHAPES, index, after)), list(fresh.rows(SHAPES, place, before))
            assert [len(one) for one in sent] == [len(one) for one in room]
            for one, other in zip(sent, room, strict=True):
                other.copy_(one)
        for name, value in expected.values.items():
            assert torch.equal(fresh.values[name], value), name
            for key, told in expected.state[name].items():
                assert torch.equal(fresh.state[name][key], told), (name, key)


def test_what_travels_comes_out_as_it_went_in() -> None:
    shard = Shard.of(Label(4, 2, 3, 1), trained(1, 3, 2), Progress(step=2, loss=0.5))
    document, tensors = shard.encode()
    again = Shard.decode(document, tensors)
    assert again.label == shard.label
    assert again.common["progress"]["loss"] == 0.5
    assert list(again.rows(SHAPES, 0, 1)), "its rows are found"
    for one, other in zip(again.rows(SHAPES, 0, 1), shard.rows(SHAPES, 0, 1), strict=True):
        assert torch.equal(one, other)


def test_an_update_taken_later_is_the_same_update() -> None:
    source, other = trained(0, 2, 3), trained(0, 2, 4)
    live = Live(1, 2, 0, source, Progress(step=3))
    for held in source.replica.held:
        held.local.grad = held.local.detach().clone()
    source.replica.buffers["scale"].fill_(7.0)
    live.keep_update(Progress(step=4))
    source.replica.buffers["scale"].fill_(1.0)  # the step was dropped
    for held in source.replica.held:
        held.local.grad = None
    assert [(label.step, label.is_committed) for label in live.labels] == [(3, True), (4, False)]
    live.take_update()
    assert live.labels == [Label(1, 4, 2, 0)]
    assert source.replica.buffers["scale"].tolist() == [7.0, 7.0]
    for mine, theirs in zip(source.replica.held, other.replica.held, strict=True):
        assert torch.equal(mine.local, theirs.local)


@pytest.mark.parametrize("needs_copies", [True, False])
def test_once_all_have_a_live_shard_only_copies_that_someone_could_go_on_from_stay(needs_copies: bool) -> None:
    holdings, source = Holdings(), trained(0, 2, 1)
    for epoch, at in ((1, 10), (1, 20)):
        holdings.keep(Shard.of(Label(epoch, at, 2, 0), source, Progress(step=at)))
    holdings.add(Live(1, 2, 0, source, Progress(step=23)))
    holdings.add(Live(2, 1, 0, source, Progress(step=10)))
    told = [holdings.labels, [Label(1, 10, 2, 1)]]
    holdings.settle(told, needs_copies=needs_copies)
    kept = [Label(1, 10, 2, 0)] if needs_copies else []
    assert holdings.labels == [Label(2, 10, 1, 0), *kept]
