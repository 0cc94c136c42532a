"""Ranks at their own pace use every sample once, however fast each is, and meet where they must."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from replicas import plan_text

from shoal.engine.own_pace import Leases
from training_runs import events_of, final_state, train_on

TARGET = str(Path(__file__).parents[1] / "jobs" / "own_pace.py") + ":job"
PLANS = {
    "async servers": 'kind = "parameter_server"\nmode = "async"',
    "asynchronous gossip": 'kind = "gossip"\nmode = "asynchronous"',
}


@given(limit=st.integers(0, 12), unit=st.integers(1, 4), end_after=st.integers(0, 14), claimants=st.integers(1, 4))
def test_every_lease_is_given_once_and_an_early_end_finishes_its_unit(
    limit: int, unit: int, end_after: int, claimants: int
) -> None:
    store = dist.HashStore()
    leases = [Leases(store, "leases", limit * unit, unit) for _ in range(claimants)]
    given_: list[int] = []
    active, turn = list(leases), 0
    while active:
        claimant = active[turn % len(active)]
        turn += 1
        number = claimant.claim()
        if number is None:
            active.remove(claimant)
            continue
        given_.append(number)
        if len(given_) == end_after:
            claimant.end()
    assert sorted(given_) == list(range(len(given_)))
    assert len(given_) % unit == 0
    assert len(given_) == min(limit * unit, -(-end_after // unit) * unit) if end_after else len(given_) == limit * unit
    assert all(claimant.limit == len(given_) for claimant in leases)


@given(unit=st.integers(1, 4), size=st.integers(0, 6), data=st.data())
def test_what_is_left_of_a_round_is_given_once_and_an_early_end_leaves_no_hole(
    unit: int, size: int, data: st.DataObject
) -> None:
    used = data.draw(st.sets(st.integers(0, max(0, unit * size - 1)), max_size=unit * size)) if size else set()
    rest = [number for number in range(unit * size) if number not in used]
    end_after = data.draw(st.integers(0, len(rest) + 1))
    leases = Leases(dist.HashStore(), "leases", unit * size, unit, numbers=rest, floor=max(used, default=-1) + 1)
    given_: list[int] = []
    while True:
        if len(given_) == end_after:
            leases.end()
        number = leases.claim()
        if number is None:
            break
        given_.append(number)
    assert sorted({*given_, *used}) == list(range(leases.limit))
    assert leases.limit % unit == 0
    assert len(given_) >= min(end_after, len(rest))


@pytest.mark.parametrize("name", PLANS)
def test_every_sample_is_used_once_although_one_rank_is_slow(name: str, tmp_path: Path) -> None:
    (tmp_path / "seen").mkdir()
    plan = plan_text(PLANS[name], steps=10)
    run = train_on(["a", "b", "c"], TARGET, plan, tmp_path / "run", settings=[f"seen={tmp_path / 'seen'}"])
    seen = {path.name: json.loads(f"[{path.read_text()}0]")[:-1] for path in (tmp_path / "seen").iterdir()}
    everything = sorted(index for indices in seen.values() for index in indices)
    assert everything == sorted(list(range(50)) * 2), "two epochs of 50 samples"
    others = [len(seen.get(name, [])) for name in ("rank-0", "rank-2")]  # one may begin when little is left
    assert len(seen.get("rank-1", [])) < max(others), "rank 1 sleeps in every step"
    assert final_state(run)["progress"]["samples"] == 100
    assert {event["reason"] for rank in range(3) for event in events_of(run, "run_finished", f"rank-{rank}")} == {
        "steps"
    }


@pytest.mark.parametrize("staleness", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_by_the_event_log_ssp_reads_nothing_older_than_its_bound(staleness: int, tmp_path: Path) -> None:
    (tmp_path / "seen").mkdir()
    sync = f'kind = "parameter_server"\nmode = "ssp"\nstaleness = {staleness}\nservers = 2'
    plan = plan_text(sync, steps=20)
    run = train_on(["a", "b", "c"], TARGET, plan, tmp_path / "run", settings=[f"seen={tmp_path / 'seen'}"])
    reads = [event for rank in range(3) for event in events_of(run, "read", f"rank-{rank}")]
    ages = [event["clock"] - event["applied"] for event in reads]
    assert len(reads) >= 3 * 15
    assert max(ages) <= staleness
    assert max(ages) == staleness, "rank 1 sleeps in every step, and nobody ran ahead of it: this shows nothing"
