"""Which exchanges a run makes, and how often: for each sync one function, which says of it what the engine does.

The exchanges themselves are the sync's own generators over buckets on the device `meta`; `price.py` walks them. What is
not among them: what ranks tell each other outside of the sync's lanes (equal starts, batch norm's statistics, seconds
of "auto"), and what goes to parameter servers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.errors import PlanError
from shoal.ops import Exchange
from shoal.plan.parts import build_coder, build_sync
from shoal.plan.schema import Plan
from shoal.strategy import flat
from shoal.strategy.agreement import agreement_bucket, num_agreements
from shoal.strategy.bucket import Bucket
from shoal.strategy.flat import Flat, bucket_bytes
from shoal.strategy.sync.allreduce import AllReduceConfig
from shoal.strategy.sync.gossip import GossipConfig, GossipSync
from shoal.strategy.sync.local import MEASURED_STEPS, TIMED_EXCHANGES, LocalConfig, Rhythm, num_fragments, rhythm
from shoal.strategy.sync.summation import Summation
from shoal.strategy.topology import Topology
from shoal.wire.transport import Memory, private_memory


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run to be priced, from its beginning and without an interruption.

    Attributes:
        plan: resolved.
        views: every rank's view of the cluster.
        parameters: the model's trainable ones, in its order, each tensor once; on the device `meta`.
        every: what `sync.every = "auto"` comes to, if that is known.
        validates: the job has validation data.
    """

    plan: Plan
    views: Sequence[Topology]
    parameters: Sequence[tuple[str, Tensor]]
    steps: int
    every: int | None = None
    validates: bool = False


@dataclass(frozen=True)
class Occasion:
    """The same exchange so many times in a run; `exchanges` has one for each rank, to be walked once."""

    name: str
    times: int
    exchanges: Sequence[Exchange]


def occasions(case: Case) -> Iterator[Occasion]:
    """All exchanges of a run.

    Raises:
        PlanError: what is exchanged depends on more than the plan.
    """
    kind = case.plan.sync.kind
    if case.plan.layout.ranks_per_replica > 1:
        raise PlanError(
            "a replica that lies over several ranks has no price yet: what goes inside it is PyTorch's own; price the "
            "plan with layout.replicate alone"
        )
    if kind not in RUNS:
        raise PlanError(f"sync {kind} has no price yet; expected one of {', '.join(RUNS)}")
    for occasion in RUNS[kind](case):
        if occasion.times:
            yield occasion


def _allreduce(case: Case) -> Iterator[Occasion]:
    """The agreement and every bucket of gradients, in every step."""
    config = case.plan.sync
    assert isinstance(config, AllReduceConfig)
    yield _exact(case, agreement_bucket(len(case.views), _on_meta), case.steps)
    for laid in flat.gradient_buckets(case.parameters, bucket_bytes(config.bucket_mb)):
        yield from _coded(case, laid.bucket(_on_meta, flags=True), case.steps)


def _local(case: Case) -> Iterator[Occasion]:
    """An agreement now and then, fragments by their rhythm, and at the end everything once more without a codec."""
    config = case.plan.sync
    assert isinstance(config, LocalConfig)
    yield _exact(case, agreement_bucket(len(case.views), _on_meta), num_agreements(case.steps))
    laid = flat.fragments(case.parameters, num_fragments(config), bucket_bytes(config.bucket_mb))
    leaving = _departures(case, config, laid)
    for index, fragment in enumerate(laid):
        for section in fragment:
            yield from _coded(case, section.bucket(_on_meta, flags=False), leaving[index])
    for section in (section for fragment in laid for section in fragment):
        yield _exact(case, section.bucket(_on_meta, flags=False), 1, " at the end")


def _gossip(case: Case) -> Iterator[Occasion]:
    """Every bucket mixed in every step; the mean of all replicas for each validation, each checkpoint and the end.

    A checkpoint that is made only because a validation was the best so far is not foreseen.
    """
    config, plan = case.plan.sync, case.plan
    assert isinstance(config, GossipConfig)
    if config.mode == "asynchronous":
        raise PlanError(
            "sync.mode asynchronous has no price: pairs meet as they happen to be ready; take mode synchronous"
        )
    yield _exact(case, agreement_bucket(len(case.views), _on_meta), num_agreements(case.steps))
    assert plan.checkpoint.every != "auto", "only all-reduce leaves that open"
    saved = _due(case.steps, plan.checkpoint.every) + 1
    validated = _due(case.steps, plan.validation.every) + 1 if case.validates and plan.validation.every else 0
    [sections] = flat.fragments(case.parameters, 1, bucket_bytes(config.bucket_mb))
    for section in sections:
        bucket = section.bucket(_on_meta, flags=False)
        if config.topology == "matching":
            for step in range(case.steps):
                yield Occasion(bucket.name, 1, [_gossips(sync).mix(bucket, step) for sync in _syncs(case)])
        else:
            yield from _coded(case, bucket, case.steps, lambda sync, own: _gossips(sync).mix(own, 0))
        yield _exact(case, bucket, saved + validated + 1, ", the mean")


RUNS: dict[str, Callable[[Case], Iterator[Occasion]]] = {"allreduce": _allreduce, "local": _local, "gossip": _gossip}
"""The table, by the sync's kind."""


def _departures(case: Case, config: LocalConfig, laid: Sequence[Sequence[Flat[Tensor]]]) -> Counter[int]:
    """How often each fragment leaves by itself."""
    if config.every != "auto":
        return _count(rhythm(config, config.every, len(laid)), case.steps)
    measured = MEASURED_STEPS.stop - 1
    if case.steps < measured:
        return Counter()
    sizes = [sum(section.num_values for section in fragment) for fragment in laid]
    first = Counter({sizes.index(max(sizes)): TIMED_EXCHANGES})
    if case.steps == measured:
        return first
    if case.every is None:
        raise PlanError(
            'sync.every is "auto": how often fragments leave is measured when the run begins, so the plan alone has no '
            "price; say what to reckon with (--every), or set sync.every to a number"
        )
    return first + _count(rhythm(config, case.every, len(laid)), case.steps - measured)


def _count(times: Rhythm, steps: int) -> Counter[int]:
    """How often each fragment leaves in steps 1 to `steps`."""
    whole, rest = divmod(steps, times.every)
    period, part = (Counter(f for step in range(1, n + 1) for f in times.leaving(step)) for n in (times.every, rest))
    return Counter({fragment: whole * period[fragment] + part[fragment] for fragment in period})


def _coded(
    case: Case,
    bucket: Bucket,
    times: int,
    start: Callable[[Summation, Bucket], Exchange] = lambda sync, bucket: sync.exchange(bucket),
) -> Iterator[Occasion]:
    """A bucket's exchanges with the plan's codec: those that it compresses, and the others."""
    options, plain = case.plan.codec, case.plan.codec.kind == "none"

    def way(count: int) -> str:
        if plain or options.compresses(count):
            return bucket.name
        return f"{bucket.name}, {'second moment' if options.learns(count) else 'uncompressed'}"

    ways = [way(count) for count in range(1, times + 1)]
    for name, count in Counter(ways).items():
        begun = {bucket.name: ways.index(name)}
        yield Occasion(name, count, [start(sync, bucket) for sync in _syncs(case, begun)])


def _exact(case: Case, bucket: Bucket, times: int, suffix: str = "") -> Occasion:
    return Occasion(bucket.name + suffix, times, [sync.exchange_exact(bucket) for sync in _syncs(case)])


def _syncs(case: Case, begun: dict[str, int] | None = None) -> list[Summation]:
    """Every rank's sync, with a coder for which so many exchanges of a bucket have begun already."""
    syncs: list[Summation] = []
    for view in case.views:
        coder = build_coder(case.plan, view)
        if coder is not None:
            coder.load_state_dict({"counts": begun or {}, "memory": {}})
        syncs.append(build_sync(case.plan, view, coder))
    return syncs


def _gossips(sync: Summation) -> GossipSync:
    assert isinstance(sync, GossipSync)
    return sync


def _due(steps: int, every: int) -> int:
    return steps // every if every else 0


def _on_meta(num_values: int, dtype: torch.dtype) -> Memory:
    return private_memory(num_values, dtype, torch.device("meta"))
