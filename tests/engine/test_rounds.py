"""Who gives an anchor and who takes it when a view of local steps begins, and what is left of a round that broke."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from shoal.data.loader import Cursor, Loader, LoaderConfig
from shoal.engine.exchange.ledger import Fragment, Held, Ledger
from shoal.engine.layout.replica import Replica
from shoal.engine.progress import Progress
from shoal.engine.views.course import Course
from shoal.engine.views.handover import Outcome
from shoal.engine.views.rounds import Rounds, Word, givers_and_takers, lost_since, rhythm_of
from shoal.engine.views.standing import Roles
from shoal.events import EventLog, read_events
from shoal.strategy.sync.local import LocalConfig
from shoal.wire.groups import World

NUM_RANKS = 4


def word(merged: list[int], digests: list[int] | None = None, every: int = 4, base: int = 0) -> Word:
    return Word(tuple(merged), tuple(digests or [0] * len(merged)), every, base)


def test_of_each_fragment_those_who_merged_most_rounds_give_to_the_rest() -> None:
    parts = givers_and_takers([word([3, 2]), word([2, 2]), None, word([3, 1])])
    assert [(part.givers, part.takers, part.differing) for part in parts] == [
        ([0, 3], [1, 2], []),
        ([0, 1], [2, 3], []),
    ]


def test_of_those_who_merged_as_much_the_majority_is_right_and_the_rest_is_named() -> None:
    [part] = givers_and_takers([word([5], [7]), word([5], [8]), word([5], [8]), word([4], [9])])
    assert (part.givers, part.takers, part.differing) == ([1, 2], [0, 3], [0])


def test_where_nobody_has_any_nobody_gives() -> None:
    assert givers_and_takers([None, None]) == []


def test_the_rhythm_is_that_of_whoever_has_settled_it() -> None:
    assert rhythm_of([word([0], every=0, base=3), word([2], every=12, base=8), None]) == (12, 8)
    assert rhythm_of([word([0], every=0, base=3), None]) == (0, 0)


class Rank:
    """One of several ranks in this process: a ledger, and a stream of values to train by."""

    def __init__(self, config: LocalConfig, number: int) -> None:
        torch.manual_seed(1)
        self.model = nn.Linear(3, 1).double()
        self.ledger = Ledger.of(Replica.whole(self.model), config)
        self.draw = torch.Generator().manual_seed(number)
        self.learned = 0

    @property
    def fragment(self) -> Fragment:
        return self.ledger.fragments[0]

    @property
    def values(self) -> list[Tensor]:
        return [section.values for section in self.fragment.sections]

    def train(self, samples: int) -> None:
        for values in self.values:
            values.add_(torch.randn(values.shape, generator=self.draw, dtype=values.dtype))
        self.ledger.count(samples, 0)
        self.learned += samples


def train_all(ranks: list[Rank], samples: list[int]) -> None:
    for rank, own in zip(ranks, samples, strict=True):
        rank.train(own)
        rank.fragment.all_samples += sum(samples)


def leave_all(ranks: list[Rank], step: int) -> list[Tensor]:
    """The mean differences of a round."""
    weights = [rank.fragment.leave(step) for rank in ranks]
    return [
        sum(
            (w * (r.fragment.anchors[k] - r.fragment.sent[k]) for w, r in zip(weights, ranks, strict=True)),
            torch.zeros_like(anchor),
        )
        for k, anchor in enumerate(ranks[0].fragment.anchors)
    ]


@given(
    merged=st.lists(st.booleans(), min_size=NUM_RANKS, max_size=NUM_RANKS),
    momentum=st.sampled_from([0.0, 0.9]),
    merge=st.sampled_from(["carry", "mix"]),
    samples=st.lists(st.integers(0, 5), min_size=NUM_RANKS, max_size=NUM_RANKS),
)
@settings(max_examples=60, deadline=None)
def test_a_round_that_somebody_merged_is_everybodys_and_any_other_never_was(
    merged: list[bool], momentum: float, merge: Any, samples: list[int]
) -> None:
    config = LocalConfig(every=4, overlap=2, outer_momentum=momentum, merge=merge)
    ranks = [Rank(config, number) for number in range(NUM_RANKS)]
    whole = [Rank(config, number) for number in range(NUM_RANKS)]  # the same without a loss
    for group in (ranks, whole):
        train_all(group, samples)
        differences = leave_all(group, 1)
        train_all(group, samples)
        for rank, has in zip(group, merged if group is ranks else [any(merged)] * NUM_RANKS, strict=True):
            if has:
                rank.fragment.merge(differences, config, overlaps=True)
    words = [word([rank.fragment.merged]) for rank in ranks]
    [part] = givers_and_takers(words)
    for index, rank in enumerate(ranks):
        if any(merged) and index in part.takers:
            source = ranks[part.givers[0]].fragment
            for tensor, other in zip(rank.fragment.tensors, source.tensors, strict=True):
                tensor.copy_(other)
            rank.fragment.take_over(config, overlaps=True)
        held = rank.fragment.held
        rank.fragment.undo()
        assert rank.fragment.held == held
        assert held == (Held(samples[index], 1) if any(merged) else Held(2 * samples[index], 0))
        assert rank.fragment.merged == int(any(merged))
    for rank, other in zip(ranks, whole, strict=True):
        for mine, undisturbed in zip(rank.values, other.values, strict=True):
            assert torch.equal(mine, undisturbed)
        for mine, undisturbed in zip(rank.fragment.tensors, other.fragment.tensors, strict=True):
            assert torch.equal(mine, undisturbed)


def course(start: int, seats: tuple[int, ...]) -> Course:
    """A view that began after step `start`; batches of 12 of 60 samples."""
    config = LoaderConfig(
        seed=1, batch_size=12, shares=(1.0,) * len(seats), accumulate=1, shuffle=True, drop_last=False, num_workers=0,
        pin_memory=False,
    )  # fmt: skip
    loader = Loader(TensorDataset(torch.zeros(60)), config, 0, None)
    began = Progress(step=start, cursor=Cursor(start // 5, start % 5))
    return Course(epoch=2, seats=seats, connected=cast(Any, None), loader=loader, start=began)


def test_what_a_lost_rank_learned_since_the_oldest_fragments_last_round_is_lost() -> None:
    known = {seat: [Held(9, 3), Held(0, 5)] for seat in (0, 4, 7)}
    [lost] = lost_since(course(6, (0, 4, 7)), known, agreed=[9, 8], staying={0, 7}, step=11)
    assert (lost.seat, lost.first_step, lost.last_step, lost.samples) == (4, 9, 11, 3 * 4)


def test_what_it_had_from_the_view_before_is_lost_too_if_no_round_has_been_merged_since() -> None:
    known = {seat: [Held(9, 3), Held(2, 5)] for seat in (0, 4, 7)}
    [lost] = lost_since(course(6, (0, 4, 7)), known, agreed=[3, 8], staying={0, 7}, step=11)
    assert (lost.first_step, lost.last_step, lost.samples) == (4, 11, 9 + 5 * 4)


def test_nothing_is_lost_of_who_leaves_when_all_have_just_averaged() -> None:
    known = {seat: [Held(9, 3)] for seat in (0, 4)}
    assert not list(lost_since(course(6, (0, 4)), known, agreed=[11], staying={0}, step=11))


def test_all_come_to_hold_one_anchor_and_who_held_another_is_told(tmp_path: Path) -> None:
    """Ranks 0 and 1 have merged a round, 2 too but holds something else, 3 has not and 4 is new."""
    config = LocalConfig(every=4, overlap=2, outer_momentum=0.9)
    ranks = [Rank(config, number) for number in range(4)]
    train_all(ranks, [3, 3, 3, 3])
    differences = leave_all(ranks, 1)
    for rank in ranks[:3]:
        rank.fragment.merge(differences, config, overlaps=True)
    assert ranks[2].fragment.momenta[0] is not None
    ranks[2].fragment.momenta[0][0] += 1.0
    ranks.append(Rank(config, 4))
    ranks[4].train(2)
    standing = Outcome(Progress(step=3), Roles(0, [0], [4], []), ())
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    worlds: list[World] = []

    def go_on(number: int) -> None:
        client = dist.TCPStore("127.0.0.1", store.port, None, False, wait_for_workers=False)
        world = World(dist.PrefixStore("view/2", client), number, len(ranks), torch.device("cpu"))
        worlds.append(world)
        world.connect()
        with EventLog(tmp_path / f"rank-{number}.jsonl", f"rank-{number}") as log:
            nothing = cast(Any, None)
            rounds = Rounds(
                job=nothing, parts=nothing, course=None, world=world, checkpoints=nothing, turnover=nothing, log=log
            )
            rounds.go_on(ranks[number].ledger, standing, Progress(step=3))
            rounds.settle(ranks[number].ledger, standing, range(len(ranks)))

    threads = [threading.Thread(target=go_on, args=(number,)) for number in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for world in worlds:  # not earlier: in one process it cannot tell its sockets from the others'
        world.close()
    for rank in ranks[1:]:
        for tensor, right in zip(rank.fragment.tensors, ranks[0].fragment.tensors, strict=True):
            assert torch.equal(tensor, right)
        assert rank.fragment.merged == 1
    for values, anchor in zip(ranks[4].values, ranks[4].fragment.anchors, strict=True):
        assert torch.equal(values, anchor), "a newcomer begins from the anchor"
    assert ranks[4].fragment.held == Held(0, 3)
    [warning] = [event for event in read_events(tmp_path) if event["kind"] == "warning"]
    assert "rank 2 held another anchor" in warning["message"]
