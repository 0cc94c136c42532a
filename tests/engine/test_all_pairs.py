"""Every sync with every codec trains on real processes, or is refused with the reason; and the docs say which."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from replicas import TARGET, Replica, plan_text

from shoal.errors import PlanError
from shoal.plan import parse_plan, resolve_plan
from shoal.plan.capability import UNSOUND
from shoal.strategy.codec import CODECS
from shoal.strategy.sync import SYNCS
from training_runs import events_of, final_state, train_on

STEPS = 6
SETTINGS = {
    "allreduce": 'kind = "allreduce"',
    "local": 'kind = "local"\nevery = 2\nfragments = 2\noverlap = 1',
    "gossip": 'kind = "gossip"',
    "parameter_server": 'kind = "parameter_server"\nmode = "ssp"',
}
PAIRS = [
    # Every codec at once in CI, with some sync; all pairs take minutes.
    pytest.param(sync, codec, marks=[pytest.mark.slow] * ((row + column) % len(SYNCS) != 0))
    for row, sync in enumerate(SYNCS)
    for column, codec in enumerate(CODECS)
    if (sync, codec) not in UNSOUND
]


@pytest.mark.parametrize(("sync", "codec"), PAIRS)
def test_a_sound_pair_trains(sync: str, codec: str, tmp_path: Path) -> None:
    plan = plan_text(SETTINGS[sync], codec=codec, steps=STEPS)
    run = train_on(["a", "b"], TARGET, plan, tmp_path / "run")
    finished = events_of(run, "run_finished")[0]
    assert finished["steps"] == STEPS
    assert math.isfinite(finished["loss"])
    assert finished["bytes_sent"] > 0
    model = final_state(run)["model"]
    assert all(value.isfinite().all() for value in model.values())
    before = Replica(0).model.state_dict()
    assert not torch.equal(model["first.weight"], before["first.weight"])


@pytest.mark.parametrize(("sync", "codec"), UNSOUND)
def test_an_unsound_pair_is_refused_with_the_reason(sync: str, codec: str) -> None:
    plan = parse_plan(plan_text(SETTINGS[sync], codec=codec), origin="test")
    with pytest.raises(PlanError, match=f"codec {codec} does not fit sync {sync}: .+; take "):
        resolve_plan(plan, 2)


def test_the_docs_table_says_which_pairs_there_are() -> None:
    page = (Path(__file__).parents[2] / "docs" / "plan.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", page.split("## Which codec with which sync")[1], re.MULTILINE)
    told = {(sync, codec): cells.split(" | ") for codec, cells in rows for sync in SYNCS}
    assert {codec for codec, _ in rows} == set(CODECS)
    for (sync, codec), cells in told.items():
        assert cells[list(SYNCS).index(sync)] == ("no" if (sync, codec) in UNSOUND else "yes"), (sync, codec)
