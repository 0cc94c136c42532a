"""What is predicted is what is counted, to the byte, on every link: in one process for all pairs, and in real runs.

RUNS plays a run of each sync step by step with real tensors, as the engine does; a sync to come adds a function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shoal.cluster.description import parse_lab
from shoal.errors import PlanError
from shoal.job.target import resolve
from shoal.ops import NODE, Exchange
from shoal.plan import Plan, parse_plan, resolve_plan
from shoal.plan import exchanges as planned
from shoal.plan.parts import build_coder, build_sync
from shoal.plan.price import Price, links_of, price, seats_of, shapes_of
from shoal.strategy import flat
from shoal.strategy.agreement import agreement_bucket
from shoal.strategy.bucket import Bucket
from shoal.strategy.codec import CODECS
from shoal.strategy.flat import Flat, bucket_bytes
from shoal.strategy.sync import SYNCS
from shoal.strategy.sync.local import num_fragments, rhythm
from shoal.strategy.topology import topologies
from shoal.wire.inprocess import run_in_process
from shoal.wire.pricing import price_rank
from shoal.wire.traffic import Traffic, messages_of
from shoal.wire.transport import private_memory
from training_runs import events_of, train_on

STEPS = 10
TARGET = str(Path(__file__).parents[1] / "jobs" / "reference.py") + ":job"
SETTINGS = {
    "library, flat": ("aab", 'kind = "allreduce"\nform = "flat"\nbucket_mb = 0.0003'),
    "library, hierarchical": ("aabbc", 'kind = "allreduce"\nbucket_mb = 0.0003'),
    "ring": ("abc", 'kind = "allreduce"\nalgorithm = "ring"\nbucket_mb = 0.0006'),
    "halving and doubling": ("abcde", 'kind = "allreduce"\nalgorithm = "halving_doubling"'),
    "scatter and gather": ("aabc", 'kind = "allreduce"\nalgorithm = "scatter_gather"'),
    "one node": ("aaa", 'kind = "allreduce"'),
    "local": ("abb", 'kind = "local"\nevery = 4\nfragments = 3\nbucket_mb = 0.0003'),
    "local, every step": ("ab", 'kind = "local"\nevery = 1'),
    "gossip on a ring": ("abcd", 'kind = "gossip"\nbucket_mb = 0.0006'),
    "gossip by chance": ("abcde", 'kind = "gossip"\ntopology = "matching"'),
}
PAIRS = [(setting, codec) for setting in SETTINGS for codec in CODECS]


def plan_of(sync: str, codec: str, *, warmup: int = 0) -> Plan:
    return parse_plan(plan_text(sync, codec, warmup=warmup), origin="the test's plan")


def plan_text(sync: str, codec: str, *, warmup: int = 0, steps: int = STEPS) -> str:
    return f"""
        [sync]
        {sync}
        [codec]
        kind = "{codec}"
        warmup_steps = {warmup}
        [batch]
        size = 12
        [compute]
        device = "cpu"
        [checkpoint]
        every = 4
        [stop]
        steps = {steps}
    """


def model() -> nn.Module:
    return resolve(TARGET).load().model()


class Rig:
    """All ranks in this process, with real tensors, codecs that remember, and a count of what each sends."""

    def __init__(self, plan: Plan, nodes: Sequence[str]) -> None:
        self.plan = resolve_plan(plan, len(nodes))
        self.views = topologies(nodes)
        self.syncs: list[Any] = [build_sync(self.plan, v, build_coder(self.plan, v)) for v in self.views]
        self.traffic = [Traffic() for _ in nodes]
        self.parameters: list[tuple[str, Tensor]] = [
            (name, p.detach()) for name, p in model().named_parameters() if p.requires_grad
        ]

    def buckets(self, laid: Flat[Tensor], *, flags: bool) -> list[Bucket]:
        return [laid.bucket(self._memory, flags=flags) for _ in self.views]

    def agreements(self) -> list[Bucket]:
        return [agreement_bucket(len(self.views), self._memory) for _ in self.views]

    def run(self, start: Callable[[Any, Bucket], Exchange], buckets: Sequence[Bucket]) -> None:
        """One exchange on all ranks, of fresh values."""
        for bucket in buckets:
            bucket.source.normal_()
        exchanges = [start(sync, bucket) for sync, bucket in zip(self.syncs, buckets, strict=True)]
        run_in_process([self._counted(rank, e) for rank, e in enumerate(exchanges)], self.members)

    def members(self, rank: int, group: str) -> list[int]:
        return self.views[rank].members(group)

    def _counted(self, rank: int, exchange: Exchange) -> Exchange:
        answer: Any = None
        while True:
            try:
                op = exchange.send(answer)
            except StopIteration as stop:
                return stop.value
            members = self.members(rank, op.group)
            if op.group != NODE:
                self.traffic[rank].record(messages_of(op, members.index(rank), members))
            answer = yield op

    @staticmethod
    def _memory(num_values: int, dtype: torch.dtype) -> Any:
        return private_memory(num_values, dtype, torch.device("cpu"))


def exchange(sync: Any, bucket: Bucket) -> Exchange:
    return sync.exchange(bucket)


def exact(sync: Any, bucket: Bucket) -> Exchange:
    return sync.exchange_exact(bucket)


def run_allreduce(rig: Rig, steps: int) -> None:
    laid = flat.gradient_buckets(rig.parameters, bucket_bytes(rig.plan.sync.bucket_mb))
    agreement, buckets = rig.agreements(), [rig.buckets(one, flags=True) for one in laid]
    for _ in range(steps):
        rig.run(exact, agreement)
        for bucket in buckets:
            rig.run(exchange, bucket)


def run_local(rig: Rig, steps: int) -> None:
    config: Any = rig.plan.sync
    laid = flat.fragments(rig.parameters, num_fragments(config), bucket_bytes(config.bucket_mb))
    fragments = [[rig.buckets(section, flags=False) for section in fragment] for fragment in laid]
    agreement, beat = rig.agreements(), rhythm(config, config.every, len(laid))
    for step in range(steps):
        if step % 8 == 0:
            rig.run(exact, agreement)
        for fragment in beat.leaving(step + 1):
            for bucket in fragments[fragment]:
                rig.run(exchange, bucket)
    for bucket in (bucket for fragment in fragments for bucket in fragment):
        rig.run(exact, bucket)


def run_gossip(rig: Rig, steps: int) -> None:
    [laid] = flat.fragments(rig.parameters, 1, bucket_bytes(rig.plan.sync.bucket_mb))
    agreement, buckets = rig.agreements(), [rig.buckets(section, flags=False) for section in laid]
    for step in range(steps):
        if step % 8 == 0:
            rig.run(exact, agreement)
        for bucket in buckets:
            rig.run(lambda sync, own, step=step: sync.mix(own, step), bucket)
        if (step + 1) % rig.plan.checkpoint.every == 0:
            for bucket in buckets:
                rig.run(exact, bucket)
    for bucket in buckets * 2:  # the end, and its checkpoint
        rig.run(exact, bucket)


RUNS: dict[str, Callable[[Rig, int], None]] = {"allreduce": run_allreduce, "local": run_local, "gossip": run_gossip}


def test_every_sync_with_a_price_is_played_here() -> None:
    assert RUNS.keys() == planned.RUNS.keys()
    assert planned.RUNS.keys() <= SYNCS.keys()


@pytest.mark.parametrize(("setting", "codec"), PAIRS)
def test_the_price_is_what_ranks_in_one_process_send(setting: str, codec: str) -> None:
    nodes, sync = SETTINGS[setting]
    plan = plan_of(sync, codec, warmup=3)
    try:
        rig = Rig(plan, nodes)
    except PlanError:
        with pytest.raises(PlanError):
            price(plan, shapes_of(model()), nodes, steps=STEPS)
        return
    RUNS[rig.plan.sync.kind](rig, STEPS)
    assert price(plan, shapes_of(model()), nodes, steps=STEPS).traffic == rig.traffic
    assert any(traffic.sent for traffic in rig.traffic) == (setting != "one node")


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_rank_alone_is_priced_as_among_all(setting: str) -> None:
    nodes, sync = SETTINGS[setting]
    views = topologies(nodes)
    plan = resolve_plan(plan_of(sync, "none"), len(nodes))
    case = planned.Case(plan=plan, views=views, parameters=shapes_of(model()), steps=STEPS)
    alone = [Traffic() for _ in nodes]
    for occasion in planned.occasions(case):
        for rank, own in enumerate(occasion.exchanges):
            once = price_rank(own, rank, lambda rank, group: views[rank].members(group))
            alone[rank].merge(once, occasion.times)
    assert alone == price(plan, shapes_of(model()), nodes, steps=STEPS).traffic


@pytest.mark.parametrize("steps", [0, 1, 7, 8, 9, 30])
def test_a_rhythm_is_counted_for_any_number_of_steps(steps: int) -> None:
    plan = plan_of('kind = "local"\nevery = 5\nfragments = 3', "int8", warmup=1)
    rig = Rig(plan, "ab")
    run_local(rig, steps)
    assert price(plan, shapes_of(model()), "ab", steps=steps).traffic == rig.traffic


REAL = {
    "flat, int8 after a warm-up": ("aab", 'kind = "allreduce"\nform = "flat"\nbucket_mb = 0.0003', "int8", 2),
    "hierarchical, PowerSGD": ("aab", 'kind = "allreduce"', "powersgd", 0),
    "halving and doubling": ("abc", 'kind = "allreduce"\nalgorithm = "halving_doubling"', "none", 0),
    "local, top-k": ("abc", 'kind = "local"\nevery = 4\nfragments = 3\noverlap = 1\nbucket_mb = 0.0003', "topk", 1),
    "local, auto": ("ab", 'kind = "local"', "bf16", 0),
    "gossip": ("abc", 'kind = "gossip"', "sign", 0),
}


@pytest.mark.parametrize("name", REAL)
def test_the_price_is_what_a_real_run_counts(name: str, tmp_path: Path) -> None:
    nodes, sync, codec, warmup = REAL[name]
    run = train_on(nodes, TARGET, plan_text(sync, codec, warmup=warmup), tmp_path / "run")
    finished = [events_of(run, "run_finished", f"rank-{rank}")[0] for rank in range(len(nodes))]
    settled = events_of(run, "rhythm")
    every = settled[0]["every"] if settled else None
    predicted = price(plan_of(sync, codec, warmup=warmup), shapes_of(model()), nodes, steps=STEPS, every=every)
    assert [Traffic.from_plain(event["traffic"]) for event in finished] == predicted.traffic
    assert [event["bytes_sent"] for event in finished] == [traffic.bytes_sent for traffic in predicted.traffic]


def test_what_depends_on_more_than_the_plan_is_refused() -> None:
    with pytest.raises(PlanError, match="--every"):
        price(plan_of('kind = "local"', "none"), shapes_of(model()), "ab", steps=STEPS)
    with pytest.raises(PlanError, match="asynchronous"):
        price(plan_of('kind = "gossip"\nmode = "asynchronous"', "none"), shapes_of(model()), "ab", steps=STEPS)


def big(plan: str, cluster: str, *, latency_s: float = 0.0) -> Price:
    """The price of a step of a million values on a described cluster."""
    described = parse_lab(cluster)
    shapes = [("weight", torch.empty(1000, 1000, device="meta"))]
    links = links_of(described, latency_s=latency_s)
    return price(parse_plan(plan, origin="test"), shapes, seats_of(described), steps=1, links=links)


def test_seconds_are_the_busiest_links() -> None:
    flat = big('sync.form = "flat"', "nodes=4,link=100mbit")
    sent = max(traffic.bytes_sent for traffic in flat.traffic)
    assert flat.seconds == pytest.approx(sent * 8 / 100e6)
    assert sent == pytest.approx(2 * 3 / 4 * 4e6, rel=0.01)


def test_each_message_in_a_row_costs_its_latency() -> None:
    quick, slow = (big("", "nodes=4,link=100mbit", latency_s=latency) for latency in (0.0, 0.01))
    assert quick.seconds is not None
    in_a_row = sum(max(count for t in part.traffic for count, _ in t.sent.values()) for part in quick.parts)
    assert in_a_row == 2 * 3 + 5  # round the ring; one of the agreement's parts is empty
    assert slow.seconds == pytest.approx(quick.seconds + in_a_row * 0.01)


def test_what_stays_on_a_node_takes_no_time() -> None:
    assert big("", "nodes=1,ranks=4,link=1mbit").seconds == 0
    hierarchical, flat = (big(f'sync.form = "{form}"', "nodes=2,ranks=2,link=100mbit") for form in ("auto", "flat"))
    assert hierarchical.seconds is not None
    assert flat.seconds is not None
    assert hierarchical.seconds < 0.8 * flat.seconds


def test_the_slowest_node_sets_the_pace(tmp_path: Path) -> None:
    (tmp_path / "cluster.toml").write_text('link = "1gbit"\n[[node]]\ncount = 2\n[[node]]\nlink = "10mbit"\n')
    slow = big("", str(tmp_path / "cluster.toml"))
    assert slow.seconds == pytest.approx(slow.traffic[0].bytes_sent * 8 / 10e6, rel=0.01)


def test_without_links_there_are_no_seconds() -> None:
    assert price(Plan(), shapes_of(model()), "ab", steps=1).seconds is None
