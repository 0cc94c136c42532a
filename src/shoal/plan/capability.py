"""Which combinations of sync and codec are sound: the one table, and the reasons for the rest."""

from __future__ import annotations

from collections.abc import Callable

from shoal.data.slowness import WatchConfig
from shoal.errors import PlanError
from shoal.plan.schema import ElasticConfig, Plan
from shoal.strategy.sync.gossip import GossipConfig, graph_of
from shoal.strategy.sync.local import LocalConfig, num_fragments

_NO_CONTRACTION = (
    "gossip sends differences to what neighbours already hold, which only comes to rest if a codec's error is smaller "
    "than its values; {codec} is right on average, but a single message may be wrong by more than it says"
)
UNSOUND: dict[tuple[str, str], str] = {
    ("gossip", "terngrad"): _NO_CONTRACTION,
    ("gossip", "randomk"): _NO_CONTRACTION,
}
"""(sync, codec) -> why not."""


def check(plan: Plan, world_size: int) -> None:
    """Refuse what is unsound.

    Raises:
        PlanError: naming both settings, the reason and what to do.
    """
    reason = UNSOUND.get((plan.sync.kind, plan.codec.kind))
    if reason is not None:
        raise PlanError(
            f"codec {plan.codec.kind} does not fit sync {plan.sync.kind}: {reason.format(codec=plan.codec.kind)}; take "
            f"{' or '.join(_sound(plan.sync.kind))}"
        )
    if plan.codec.variance_every and plan.sync.kind != "allreduce":
        raise PlanError(
            f"codec.variance_every does not fit sync {plan.sync.kind}: it holds Adam's second moment still while "
            "gradients are summed in every step; take sync allreduce, or leave it out"
        )
    _check_layout(plan)
    _check_elastic(plan, world_size)
    _check_backup(plan)
    _check_balance(plan)
    _check_cadence(plan)
    for kind, verify in _CHECKS.items():
        if plan.sync.kind == kind:
            verify(plan, world_size)


def _check_layout(plan: Plan) -> None:
    layout = plan.layout
    if layout.ranks_per_replica == 1:
        return
    axis = next(axis for axis in ("shard", "tensor", "pipeline") if getattr(layout, axis) > 1)
    asynchronous = plan.sync.kind == "gossip" and getattr(plan.sync, "mode", "") == "asynchronous"
    if plan.sync.kind == "parameter_server" or asynchronous:
        kind = "gossip in mode asynchronous" if asynchronous else plan.sync.kind
        raise PlanError(
            f"layout.{axis} = {getattr(layout, axis)} does not fit sync {kind}: there each rank goes at its own pace, "
            "while the ranks of a divided replica compute in step; take sync allreduce, local, or gossip in mode "
            "synchronous"
        )
    if plan.codec.variance_every:
        raise PlanError(
            f"layout.{axis} = {getattr(layout, axis)} does not fit codec.variance_every: it clips momentum by the "
            "norm of a whole replica's gradient on one rank; leave it out"
        )
    if layout.stages > 1 and layout.schedule in ("gpipe", "1f1b"):
        raise PlanError(
            f"layout.stages is {layout.stages}, but schedule {layout.schedule} has one stage a rank; take "
            "interleaved or zero_bubble"
        )
    if layout.pipeline > 1 and layout.stages == 1 and layout.schedule in ("interleaved", "zero_bubble"):
        raise PlanError(
            f"layout.schedule {layout.schedule} needs several stages on each rank, but layout.stages is 1; set it "
            "to 2 or more, or take 1f1b"
        )
    if layout.pipeline > 1 and plan.batch.accumulate > 1:
        raise PlanError(
            f"batch.accumulate is {plan.batch.accumulate}, but a pipeline cuts its samples by layout.micro_batches; "
            "leave accumulate out"
        )
    if layout.pipeline > 1 and plan.compute.precision == "bf16" and layout.shard > 1:
        raise PlanError(
            "layout.pipeline with layout.shard and compute.precision bf16 is not supported yet; take fp32, or one axis"
        )


def _check_backup(plan: Plan) -> None:
    """Without the slowest ranks there is no knowing beforehand who takes part."""
    if not getattr(plan.sync, "backup", 0):
        return
    reasons = {
        "batch.balance": (plan.batch.balance, "it gives slow ranks less instead of dropping what they computed"),
        "a codec": (plan.codec.kind != "none", "error feedback would remember gradients that were dropped"),
        "a divided replica": (plan.layout.ranks_per_replica > 1, "its ranks compute one gradient together"),
    }
    for what, (given, reason) in reasons.items():
        if given:
            raise PlanError(f"sync.backup does not fit {what}: {reason}; leave one of the two out")


def _check_elastic(plan: Plan, world_size: int) -> None:
    elastic = plan.elastic
    if 0 < elastic.leave_out_slower_than <= WatchConfig().factor:
        raise PlanError(
            f"elastic.leave_out_slower_than is {elastic.leave_out_slower_than:g}, but below {WatchConfig().factor:g} "
            "times the usual nobody counts as slow; set more, or 0 for never"
        )
    if elastic.leave_out_slower_than and plan.sync.kind != "allreduce":
        raise PlanError(
            f"elastic.leave_out_slower_than does not fit sync {plan.sync.kind}: its ranks do not tell each other in "
            "every step how long they take; take sync allreduce, or leave it out"
        )
    _check_tls(elastic)
    if not elastic.min_nodes:
        return
    most = world_size if elastic.max_nodes is None else elastic.max_nodes
    if isinstance(plan.sync, GossipConfig) and plan.sync.topology == "edges":
        raise PlanError(
            "elastic.min_nodes does not fit sync.topology edges, whose edges name ranks that may be gone; take a "
            "topology that is made anew for those who are there: ring, torus, exponential or matching"
        )
    _check_elastic_layout(plan)
    if plan.codec.variance_every:
        raise PlanError(
            "elastic.min_nodes does not fit codec.variance_every: a newcomer has no momentum in units of a second "
            "moment; leave one of the two out"
        )
    if plan.batch.size < most:
        raise PlanError(
            f"batch.size is {plan.batch.size}, fewer than the {most} workers there may be (elastic.max_nodes); set at "
            f"least {most}"
        )


def _check_tls(elastic: ElasticConfig) -> None:
    given = {name: getattr(elastic, name) for name in ("tls_certificate", "tls_key", "tls_authority")}
    if not any(given.values()):
        return
    for name in ("tls_certificate", "tls_key"):
        if not given[name]:
            other = next(other for other, path in given.items() if path)
            raise PlanError(
                f"elastic.{other} is set without elastic.{name}: TLS needs a certificate and its private key; set "
                "both, or leave all out"
            )
    if not elastic.min_nodes:
        raise PlanError(
            "elastic.tls_certificate is for the coordinator's connections, and without elastic.min_nodes there is no "
            "coordinator; set min_nodes, or leave it out"
        )


def _check_elastic_layout(plan: Plan) -> None:
    """Replicas that several ranks hold together, while ranks come and go."""
    layout = plan.layout
    for axis, why in _FIXED_AXES.items():
        if getattr(layout, axis) > 1:
            raise PlanError(
                f"elastic.min_nodes does not fit layout.{axis} = {getattr(layout, axis)}: {why}, so a replica cannot "
                "go on with a rank less; take layout.shard, which is divided anew over any number of ranks, or leave "
                "min_nodes out"
            )
    if layout.shard == 1:
        return
    reasons = {
        f"sync {plan.sync.kind}": (plan.sync.kind != "allreduce", "what a rank has told and not told is lost with it"),
        f"codec {plan.codec.kind}": (plan.codec.kind != "none", "what it remembers belongs to one division"),
        "checkpoint.every = auto": (plan.checkpoint.every == "auto", "it weighs losses that go back to the disk"),
        "elastic.leave_out_slower_than": (bool(plan.elastic.leave_out_slower_than), "its ranks wait for each other"),
    }
    for what, (given, why) in reasons.items():
        if given:
            raise PlanError(
                f"elastic.min_nodes with layout.shard = {layout.shard} does not fit {what}: {why}; leave one of the "
                "two out"
            )


_FIXED_AXES = {
    "tensor": "how matrices are cut depends on how many ranks cut them, heads and all",
    "pipeline": "each rank has layers of its own",
}


def _check_balance(plan: Plan) -> None:
    if not plan.batch.balance:
        return
    if plan.sync.kind != "allreduce":
        raise PlanError(
            f"batch.balance does not fit sync {plan.sync.kind}: shares may change only where all ranks commit every "
            "step together; take sync allreduce, or leave balance out"
        )
    if plan.layout.ranks_per_replica > 1:
        raise PlanError(
            "batch.balance does not fit a divided replica: its ranks wait for each other while they compute, so none "
            "of them knows how fast it is; take layout.replicate alone, or leave balance out"
        )
    if plan.codec.variance_every:
        raise PlanError(
            "batch.balance does not fit codec.variance_every: a step that is dropped for lack of memory cannot be "
            "taken out of the momentum again; leave one of the two out"
        )


def _check_cadence(plan: Plan) -> None:
    if plan.checkpoint.every == "auto" and plan.sync.kind != "allreduce":
        raise PlanError(
            f"checkpoint.every = auto does not fit sync {plan.sync.kind}: only under all-reduce do the ranks agree in "
            "every step on what follows it; give a number of steps"
        )


def _sound(sync: str) -> list[str]:
    candidates = ["int8", "topk", "none"]
    return [codec for codec in candidates if (sync, codec) not in UNSOUND]


def _check_local(plan: Plan, _: int) -> None:
    sync = plan.sync
    assert isinstance(sync, LocalConfig)
    if sync.every == "auto":
        return
    fragments = num_fragments(sync)
    if fragments > sync.every:
        raise PlanError(
            f"sync.fragments is {fragments}, more than sync.every {sync.every}: at most one fragment leaves in a step; "
            f"set fragments to at most {sync.every}"
        )
    if sync.overlap != "auto" and sync.overlap > sync.every:
        raise PlanError(
            f"sync.overlap is {sync.overlap}, more than sync.every {sync.every}: a fragment would leave again before "
            f"it is merged; set overlap to at most {sync.every}"
        )


def _check_gossip(plan: Plan, world_size: int) -> None:
    sync = plan.sync
    assert isinstance(sync, GossipConfig)
    if sync.topology == "edges" and not sync.edges and world_size > 1:
        raise PlanError("sync.topology is edges, but sync.edges is empty; list pairs of ranks, e.g. [[0, 1], [1, 2]]")
    if sync.topology != "edges" and sync.edges:
        raise PlanError(
            f"sync.edges has no effect under topology {sync.topology}; set topology to edges, or leave it out"
        )
    if sync.topology != "matching":
        graph_of(sync, world_size)
    if sync.topology == "matching" and plan.codec.kind != "none":
        raise PlanError(
            f"codec {plan.codec.kind} does not fit sync.topology matching: neighbours have to remember what they were "
            "told, and these change in every step; take ring, torus or exponential, or codec none"
        )
    if sync.mode == "asynchronous" and plan.codec.kind != "none":
        raise PlanError(
            f"codec {plan.codec.kind} does not fit sync.mode asynchronous: a pair that meets at random has no common "
            "memory to send differences to; take mode synchronous, or codec none"
        )
    if plan.codec.error_feedback:
        raise PlanError(
            "codec.error_feedback does not fit sync gossip, which sends differences to what was told before and so "
            "feeds errors back already; leave it out"
        )


_CHECKS: dict[str, Callable[[Plan, int], None]] = {"local": _check_local, "gossip": _check_gossip}
