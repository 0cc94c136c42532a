"""Many random faults in one run: what comes out is plain PyTorch's, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from allreduce_runs import assert_as_plain_pytorch, assert_never_back, assert_nothing_runs, plan
from elastic_runs import LEASE_S, events
from replicas import BATCH, NUM_SAMPLES, TARGET

from command_line import training
from shoal.dashboard.audit import audit
from shoal.events import read_events
from shoal.run import Run

KINDS = ("kill", "freeze", "slow", "join", "preempt", "kill_coordinator")
EVERY_STEPS = (15, 40)


def random_faults(folder: Path, count: int) -> list[str]:
    """The option that asks for `count` of them."""
    path = folder / "faults.toml"
    kinds = ", ".join(f'"{kind}"' for kind in KINDS)
    path.write_text(
        f"seed = 1\n[random]\ncount = {count}\nkinds = [{kinds}]\nspare = 2\nevery_steps = {list(EVERY_STEPS)}\n"
        f"seconds = [0.3, {2 * LEASE_S}]\n"
    )
    return ["--faults", str(path)]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("count", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_through_random_faults_training_is_plain_pytorchs(tmp_path: Path, count: int) -> None:
    steps = 2 * count * EVERY_STEPS[1]
    given = [*plan(tmp_path, elastic="restarts = 1000\nmax_nodes = 5"), *random_faults(tmp_path, count)]
    more = ["--nodes", "4", "--steps", str(steps), "--set", "nap_s=0.02"]
    with training(TARGET, tmp_path / "run", *given, *more) as handle:
        ended = handle.wait(patience_s=1100)
    run = Run(tmp_path / "run")
    assert ended.code == 0, ended.stderr
    assert len(events(run, "fault_injected")) == count
    found = audit(read_events(run.events), NUM_SAMPLES)
    assert found.is_clean, found
    assert found.epochs == steps // -(-NUM_SAMPLES // BATCH)
    assert_as_plain_pytorch(run, steps)
    assert_never_back(run)
    assert_nothing_runs(run)
