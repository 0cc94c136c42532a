"""Of several failures, the one that ended the run is told, and not that of somebody who was never let in."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.events import EventLog
from shoal.launch.failure import explain
from shoal.run import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path)
    run.events.mkdir()
    run.logs.mkdir()
    with EventLog(run.events / "rank-0.jsonl", "rank-0") as log:
        log.write("view", epoch=1, seats=[0, 1])
    return run


def fail(run: Run, source: str, message: str) -> None:
    with EventLog(run.events / f"{source}.jsonl", source) as log:
        log.write("error", error="CoordinatorError", message=message, traceback="", symptom=False)


def test_a_stranger_that_was_refused_is_not_why_a_run_failed(run: Run) -> None:
    fail(run, "rank-7", "refused")
    fail(run, "rank-1", "no such token")
    assert str(explain(run, {1: 1}, since=0.0)) == "rank 1: no such token"


def test_a_worker_of_the_launchers_own_counts_although_it_never_came_in(run: Run) -> None:
    fail(run, "rank-7", "no such file")
    assert str(explain(run, {7: 1}, since=0.0)) == "rank 7: no such file"


def test_a_server_is_no_stranger(run: Run) -> None:
    fail(run, "server-0", "no such key")
    assert str(explain(run, {}, since=0.0)) == "server 0: no such key"


def test_when_all_have_left_and_none_has_failed_that_is_said(run: Run) -> None:
    fail(run, "rank-7", "refused")
    told = str(explain(run, {}, since=0.0))
    assert told.startswith("all workers left before training had come to its end; --run ")
    assert "--resume" in told
