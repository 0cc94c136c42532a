"""A plan is plain data: what is read is what was written, and a mistake is one sentence that helps."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import PlanError
from shoal.plan import Plan, check_resumable, dump_plan, load_plan, parse_plan, plan_hash, resolve_plan, with_flags
from shoal.plan.schema import (
    BatchConfig,
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    LayoutConfig,
    StopConfig,
    ValidationConfig,
)
from shoal.strategy.codec.bf16 import Bf16Config
from shoal.strategy.codec.none import NoneConfig
from shoal.strategy.sync.allreduce import AllReduceConfig

counts, positive = st.integers(0, 10**6), st.integers(1, 10**6)
above_zero = st.floats(1e-9, 1e9)
plans = st.builds(
    Plan,
    seed=counts,
    layout=st.builds(LayoutConfig, replicate=st.none() | positive),
    sync=st.builds(
        AllReduceConfig, form=st.sampled_from(["auto", "flat", "hierarchical"]), bucket_mb=st.floats(1e-3, 1024)
    ),
    codec=st.sampled_from([NoneConfig(), Bf16Config()]),
    batch=st.builds(
        BatchConfig,
        size=positive,
        accumulate=positive,
        shares=st.none() | st.lists(st.floats(0, 1e9), min_size=1, max_size=4).map(tuple),
    ),
    compute=st.builds(
        ComputeConfig,
        device=st.sampled_from(["auto", "cpu", "cuda"]),
        precision=st.sampled_from(["fp32", "bf16"]),
        clip_norm=st.none() | above_zero,
        threads=counts,
    ),
    data=st.builds(DataConfig, shuffle=st.booleans(), drop_last=st.booleans(), workers=counts),
    validation=st.builds(ValidationConfig, every=counts, samples=counts),
    checkpoint=st.builds(CheckpointConfig, every=counts, keep=positive, best=st.booleans(), memory_every=counts),
    stop=st.builds(
        StopConfig,
        steps=st.none() | counts,
        epochs=st.none() | counts,
        seconds=st.none() | above_zero,
        until=st.none() | st.text(max_size=8),
        patience=counts,
    ),
)


def read(text: str) -> Plan:
    return parse_plan(text, origin="plan.toml")


@given(plan=plans)
def test_what_is_written_is_read_back_unchanged(plan: Plan) -> None:
    again = read(dump_plan(plan))
    assert again == plan
    assert plan_hash(again) == plan_hash(plan)


@given(one=plans, other=plans)
def test_plans_have_the_same_hash_only_if_they_are_equal(one: Plan, other: Plan) -> None:
    assert (plan_hash(one) == plan_hash(other)) == (one == other)


def test_every_field_changes_the_hash() -> None:
    base = resolve_plan(Plan(), 2)
    changes: dict[str, dict[str, Any]] = {
        "layout": {
            "replicate": 3,
            "shard": 2,
            "tensor": 2,
            "pipeline": 2,
            "schedule": "gpipe",
            "stages": 2,
            "micro_batches": 3,
            "recompute": True,
            "keep_gathered": True,
            "offload": True,
            "defer_above": 9,
        },
        "sync": {
            "form": "flat",
            "algorithm": "ring",
            "bucket_mb": 8.0,
            "lanes": 3,
            "verify": True,
            "backup": 1,
            "backup_grace": 0.5,
        },
        "batch": {"size": 65, "accumulate": 2, "shares": (1.0, 2.0), "balance": True},
        "compute": {"device": "cpu", "precision": "bf16", "clip_norm": 1.0, "threads": 1},
        "data": {"shuffle": False, "drop_last": True, "workers": 1},
        "validation": {"every": 99, "samples": 1},
        "checkpoint": {"every": 99, "keep": 3, "best": False, "memory_every": 7},
        "stop": {"steps": 1, "epochs": 2, "seconds": 1.0, "until": "val_loss<=1", "patience": 1},
    }
    changed = [dataclasses.replace(base, seed=1), dataclasses.replace(base, codec=Bf16Config())]
    for table, values in changes.items():
        config = getattr(base, table)
        assert values.keys() | {"kind"} == {f.name for f in dataclasses.fields(config)} | {"kind"}, table
        for key, value in values.items():
            changed.append(dataclasses.replace(base, **{table: dataclasses.replace(config, **{key: value})}))
    hashes = [plan_hash(plan) for plan in [base, *changed]]
    assert len(set(hashes)) == len(hashes)
    assert all(len(name) == 12 for name in hashes)


@pytest.mark.parametrize(
    ("elastic", "told"),
    [
        ('tls_certificate = "a.pem"', "elastic.tls_certificate is set without elastic.tls_key"),
        ('tls_key = "a.key"', "elastic.tls_key is set without elastic.tls_certificate"),
        ('tls_authority = "a.pem"', "elastic.tls_authority is set without elastic.tls_certificate"),
        ('tls_certificate = "a.pem"\ntls_key = "a.key"\nmin_nodes = 0', "there is no coordinator"),
    ],
)
def test_half_a_certificate_is_refused(elastic: str, told: str) -> None:
    text = elastic if "min_nodes" in elastic else f"min_nodes = 1\n{elastic}"
    with pytest.raises(PlanError, match=told):
        resolve_plan(read(f"[elastic]\n{text}"), 2)


def test_the_hash_is_the_same_in_every_process_and_version() -> None:
    # A run is named by it: a change of this value means that old runs cannot be joined or compared by name any more.
    assert plan_hash(Plan(batch=BatchConfig(size=8))) == plan_hash(read("[batch]\nsize = 8"))


MISTAKES = [
    ("sed = 1", 1, "unknown key 'sed' (did you mean 'seed'?)"),
    ("[bach]\nsize = 1", 1, "unknown key 'bach' (did you mean 'batch'?)"),
    ("\n\n[batch]\nsize = 8\nacumulate = 2", 5, "unknown key 'acumulate' (did you mean 'accumulate'?)"),
    ("[batch]\nsize = 0", 2, "batch.size: got the integer 0, expected greater than or equal to 1"),
    ("[batch]\nsize = '8'", 2, "batch.size: got the string '8', expected"),
    ("[batch]\nsize = 1.5", 2, "batch.size: got the number 1.5, expected"),
    ("[batch]\nsize = true", 2, "batch.size: got the boolean True, expected"),
    ("[batch]\nshares = [1, -1]", 2, "expected greater than or equal to 0"),
    ("[batch]\nshares = 2", 2, "batch.shares: got the integer 2"),
    ("[batch]\nshares = [inf, 1.0]", 2, "batch.shares"),
    ("[batch]\nshares = [nan, 1.0]", 2, "batch.shares"),
    ("batch = 3", 1, "expected a table [batch]"),
    ("[data]\nshuffle = 1", 2, "data.shuffle: got the integer 1, expected"),
    ("[compute]\nprecision = 'bf15'", 2, "got 'bf15', expected 'fp32' or 'bf16' (did you mean 'bf16'?)"),
    ("[compute]\nclip_norm = 0", 2, "compute.clip_norm"),
    ("[codec]\nkind = 'bf61'", 2, "codec.kind: got 'bf61', expected one of none, bf16, "),
    ("[codec]\nbits = 4", 2, "unknown key 'bits'"),
    ("[codec]\nkind = 'bf16'\nbits = 4", 3, "unknown key 'bits'"),
    ("[sync]\nform = 'hierachical'", 2, "(did you mean 'hierarchical'?)"),
    ("[sync]\nbucket_mb = 0", 2, "sync.bucket_mb"),
    ("[sync]\nkind = 'alreduce'", 2, "alreduce"),
    ("[checkpoint]\nkeep = 0", 2, "checkpoint.keep"),
    ("[stop]\nseconds = -1", 2, "stop.seconds"),
]


@pytest.mark.parametrize(("text", "line", "told"), MISTAKES)
def test_a_mistake_is_told_with_its_line_what_was_got_and_what_was_expected(text: str, line: int, told: str) -> None:
    with pytest.raises(PlanError) as caught:
        read(text)
    message = str(caught.value)
    assert message.startswith(f"plan.toml:{line}: ")
    assert told in message
    assert "\n" not in message


def test_toml_that_is_none_and_files_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"plan\.toml: not valid TOML: .*line 1"):
        read("seed 1")
    with pytest.raises(PlanError, match=r"cannot read .*nowhere\.toml: No such file"):
        load_plan(tmp_path / "nowhere.toml")
    (tmp_path / "latin.toml").write_bytes(b"# caf\xe9\n")
    with pytest.raises(PlanError, match="it is not UTF-8 text"):
        load_plan(tmp_path / "latin.toml")


def test_flags_go_before_the_plan_and_the_plan_before_the_defaults() -> None:
    plan = read("[stop]\nsteps = 5\npatience = 2\n[batch]\nsize = 8")
    flagged = with_flags(plan, {"stop": {"steps": 9}})
    assert flagged.stop == StopConfig(steps=9, patience=2)
    assert flagged.batch.size == 8
    assert flagged.checkpoint == CheckpointConfig()
    assert with_flags(plan, {}) == plan


def test_a_flag_that_does_not_fit_is_told_without_a_line() -> None:
    with pytest.raises(PlanError, match=r"^command line: stop\.steps: got the integer -1"):
        with_flags(Plan(), {"stop": {"steps": -1}})


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_a_resolved_plan_leaves_nothing_open_and_resolves_to_itself(world_size: int) -> None:
    plan = resolve_plan(Plan(), world_size)
    assert plan.layout.replicate == world_size
    assert plan.batch.shares == (1.0,) * world_size
    assert resolve_plan(plan, world_size) == plan
    assert read(dump_plan(plan)) == plan


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[layout]\nreplicate = 4", r"layout\.replicate is 4, but there are 3 ranks"),
        ("[batch]\nshares = [1, 2]", r"batch\.shares has 2 weights, but there are 3 ranks"),
        ("[batch]\nshares = [0, 0, 0]", r"batch\.shares add up to 0.*at least one rank"),
        ("[batch]\nshares = [1e308, 1e308, 1e308]", r"batch\.shares"),
        ("[batch]\nsize = 2", r"batch\.size is 2, fewer than the 3 ranks"),
        ("[stop]\nuntil = 'val_loss=1'", r"got 'val_loss=1', expected a condition such as 'val_loss<=1\.9'"),
        ("[stop]\nuntil = 'val_loss<=1'\n[validation]\nevery = 0", r"stop\.until .* validation\.every is 0"),
        ("[stop]\npatience = 3\n[validation]\nevery = 0", r"stop\.patience .* validation\.every is 0"),
        (
            "[batch]\nbalance = true\n[sync]\nkind = 'local'",
            r"batch\.balance does not fit sync local",
        ),
        ("[batch]\nbalance = true\n[layout]\nshard = 3", r"batch\.balance does not fit a divided replica"),
        (
            "[batch]\nbalance = true\n[codec]\nkind = 'int8'\nvariance_every = 8",
            r"balance does not fit codec\.v",
        ),
        (
            "[elastic]\nmin_nodes = 1\n[sync]\nkind = 'local'\n[layout]\nshard = 3",
            r"min_nodes with layout.shard = 3 does not fit sync local",
        ),
        (
            "[elastic]\nmin_nodes = 1\n[sync]\nkind = 'gossip'\ntopology = 'edges'\nedges = [[0, 1], [1, 2]]",
            r"min_nodes does not fit sync\.topology edges",
        ),
        ("[elastic]\nmin_nodes = 1\n[layout]\ntensor = 3", r"min_nodes does not fit layout\.tensor = 3: how matrices"),
        ("[elastic]\nmin_nodes = 1\n[layout]\npipeline = 3", r"min_nodes does not fit layout\.pipeline = 3: each rank"),
        (
            "[elastic]\nmin_nodes = 1\n[layout]\nshard = 3\n[codec]\nkind = 'int8'",
            r"min_nodes with layout\.shard = 3 does not fit codec int8",
        ),
        (
            "[elastic]\nmin_nodes = 1\n[layout]\nshard = 3\n[sync]\nkind = 'gossip'",
            r"min_nodes with layout\.shard = 3 does not fit sync gossip",
        ),
        (
            "[elastic]\nmin_nodes = 1\n[layout]\nshard = 3\n[checkpoint]\nevery = 'auto'",
            r"min_nodes with layout\.shard = 3 does not fit checkpoint\.every = auto",
        ),
        ("[checkpoint]\nevery = 'auto'\n[sync]\nkind = 'gossip'", r"checkpoint\.every = auto does not fit sync gossip"),
        ("[elastic]\nleave_out_slower_than = 1.1", r"leave_out_slower_than is 1\.1, but below 1\.3 times"),
        (
            "[elastic]\nleave_out_slower_than = 3\n[sync]\nkind = 'local'",
            r"slower_than does not fit sync",
        ),
    ],
)
def test_parts_that_do_not_fit_each_other_are_told(text: str, told: str) -> None:
    with pytest.raises(PlanError, match=told):
        resolve_plan(read(text), 3)


def test_only_when_to_stop_may_change_in_a_run() -> None:
    plan = resolve_plan(Plan(), 2)
    check_resumable(plan, plan)
    check_resumable(plan, dataclasses.replace(plan, stop=StopConfig(steps=3)))
    with pytest.raises(PlanError, match="seed was 0 when the run began, and is 1 now"):
        check_resumable(plan, dataclasses.replace(plan, seed=1))
    with pytest.raises(PlanError, match="codec was none when the run began, and is bf16 now"):
        check_resumable(plan, dataclasses.replace(plan, codec=Bf16Config()))
    with pytest.raises(PlanError, match=r"batch was size=64 when the run began, and is size=8 now"):
        check_resumable(plan, dataclasses.replace(plan, batch=dataclasses.replace(plan.batch, size=8)))


def test_a_plan_without_a_limit_ends_after_one_epoch() -> None:
    assert resolve_plan(Plan(), 2).stop.epochs == 1
    for limit in ("steps = 5", "epochs = 7", "seconds = 1.5", "until = 'val_loss<=1'", "patience = 2"):
        stop = resolve_plan(parse_plan(f"[stop]\n{limit}", origin="plan.toml"), 2).stop
        assert stop.epochs != 1
