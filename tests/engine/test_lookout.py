"""Slow ranks are named, once, and by choice the slowest leave as long as enough others stay."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.data.slowness import Slow
from shoal.engine.division import Measured
from shoal.engine.lookout import Lookout, LookoutConfig, leavers
from shoal.events import EventLog, read_events


def slow(rank: int, factor: float, *, persistent: bool = True) -> Slow:
    return Slow(rank=rank, cause="computing", factor=factor, since_step=1, persistent=persistent)


@pytest.mark.parametrize(
    ("bound", "min_ranks", "expected"),
    [(0.0, 1, []), (2.0, 1, [3, 1]), (4.0, 1, [3]), (2.0, 3, [3]), (2.0, 4, []), (9.0, 1, [])],
)
def test_the_slowest_leave_as_long_as_enough_stay(bound: float, min_ranks: int, expected: list[int]) -> None:
    config = LookoutConfig(rank=0, nodes=("a", "b", "c", "d"), leave_out_slower_than=bound, min_ranks=min_ranks)
    found = [slow(1, 3.0), slow(2, 8.0, persistent=False), slow(3, 5.0)]
    assert leavers(found, config) == expected


def test_rank_0_tells_who_is_slow_and_the_slow_one_leaves_once(tmp_path: Path) -> None:
    left: list[int] = []
    logs = [EventLog(tmp_path / f"rank-{rank}.jsonl", f"rank-{rank}") for rank in range(3)]
    lookouts = [
        Lookout(
            LookoutConfig(rank=rank, nodes=("a", "b", "b"), leave_out_slower_than=3.0, min_ranks=1),
            logs[rank],
            lambda rank=rank: left.append(rank),
        )
        for rank in range(3)
    ]
    for step in range(1, 120):
        data_s = 0.4 if step > 40 else 0.01
        measured = Measured(samples=(10, 5, 0), data_s=(0.02, data_s, 0.0), compute_s=(0.1, 0.05, 0.01))
        for lookout in lookouts:
            lookout.look(step, measured)
    told = [event for event in read_events(tmp_path) if event["kind"] == "slow"]
    assert {event["source"] for event in told} == {"rank-0"}
    assert [(e["rank"], e["node"], e["cause"], e["persistent"]) for e in told] == [
        (1, "b", "data", False),
        (1, "b", "data", True),
    ]
    assert told[0]["since_step"] == 41
    assert told[0]["factor"] == pytest.approx(0.45 / 0.06)
    assert left == [1]
    [warning] = [event for event in read_events(tmp_path) if event["kind"] == "warning"]
    assert "7.5 times as long as usual (at data), and leaves" in warning["message"]
    for log in logs:
        log.close()
