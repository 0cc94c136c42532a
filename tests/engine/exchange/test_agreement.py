"""Every rank reads the same verdict, whatever one of them had to say."""

from __future__ import annotations

import math

import pytest
import torch

from shoal.engine.exchange.agreement import Agreement, Ballot, Verdict
from shoal.strategy.sync.allreduce import AllReduceConfig, AllReduceSync
from shoal.strategy.topology import topologies
from shoal.wire.inprocess import run_in_process
from shoal.wire.transport import private_memory


def agree(
    losses: list[float],
    stops: list[bool],
    dtype: torch.dtype = torch.float64,
    ballots: list[Ballot] | None = None,
) -> list[Verdict]:
    world_size = len(losses)
    agreements = [
        Agreement(rank, world_size, lambda n, dtype: private_memory(n, dtype, torch.device("cpu")))
        for rank in range(world_size)
    ]
    given = ballots or [Ballot(stop=stop) for stop in stops]
    for agreement, loss, ballot in zip(agreements, losses, given, strict=True):
        agreement.bucket.source.fill_(99.0)  # what an exchange leaves behind is of no use to the next
        agreement.propose(torch.tensor(loss, dtype=dtype), ballot)
    views = topologies("abc"[:world_size])
    run_in_process(
        [
            AllReduceSync(AllReduceConfig(), None, view).exchange_exact(agreement.bucket)
            for view, agreement in zip(views, agreements, strict=True)
        ],
        lambda rank, group: views[rank].members(group),
    )
    return [agreement.read() for agreement in agreements]


def test_the_loss_is_the_sum_of_all_parts() -> None:
    for verdict in agree([0.125, 0.25, 0.0], [False] * 3):
        assert verdict == Verdict(0.375, [], stop=False, data_s=[0.0] * 3, compute_s=[0.0] * 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_told_with_its_rank(bad: float) -> None:
    for verdict in agree([0.5, bad, 0.5], [False] * 3):
        assert verdict.non_finite_ranks == [1]
        assert math.isnan(verdict.loss)
    assert agree([bad, 1.0, bad], [False] * 3)[1].non_finite_ranks == [0, 2]


def test_one_vote_to_stop_is_enough() -> None:
    assert [verdict.stop for verdict in agree([1.0] * 3, [False, False, True])] == [True] * 3
    assert [verdict.stop for verdict in agree([1.0] * 3, [True] * 3)] == [True] * 3
    assert [verdict.stop for verdict in agree([1.0] * 3, [False] * 3)] == [False] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_loss_of_any_precision_can_be_told(dtype: torch.dtype) -> None:
    assert agree([0.5, 0.25], [False] * 2, dtype)[0].loss == 0.75


def test_times_are_told_by_rank_and_one_wish_for_a_checkpoint_is_enough() -> None:
    given = [Ballot(data_s=0.25, compute_s=1.0), Ballot(save=True, compute_s=2.0), Ballot()]
    for verdict in agree([1.0] * 3, [False] * 3, ballots=given):
        assert verdict.data_s == [0.25, 0.0, 0.0]
        assert verdict.compute_s == [1.0, 2.0, 0.0]
        assert verdict.save
    assert not agree([1.0] * 2, [False] * 2)[0].save
