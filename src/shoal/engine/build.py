"""Makes a rank's parts from a job and a plan, and checks them before anything is trained."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset

from shoal.cluster.cores import cores, threads
from shoal.data.loader import Cursor, Loader, LoaderConfig, num_samples
from shoal.engine import random_state
from shoal.engine.exchange import EXCHANGES, ReplicaExchange
from shoal.engine.exchange.base import Among, Wiring
from shoal.engine.exchange.ledger import Ledger
from shoal.engine.layout.deferred import build
from shoal.engine.layout.divide import Divided, Task, divide
from shoal.engine.layout.lanes import Lanes
from shoal.engine.layout.pipeline.line import Line
from shoal.engine.layout.pipeline.trace import Call, Traced, call_of
from shoal.engine.layout.place import Place, take_place
from shoal.engine.layout.replica import Replica
from shoal.engine.replicas import make_equal
from shoal.errors import JobError, MachineError
from shoal.events import EventLog
from shoal.job.job import Job
from shoal.job.sparse_table import sparse_tables
from shoal.plan.parts import build_coder, build_sync
from shoal.plan.schema import ComputeConfig, Plan
from shoal.strategy.layout.grid import Grid, arrange, replicas
from shoal.strategy.topology import Topology
from shoal.wire.group import Group
from shoal.wire.groups import World
from shoal.wire.transport import MemoryPool, Transport

_WHOLE_MATRICES = ("Adafactor", "LBFGS", "Muon")
"""Optimizers of torch.optim whose step on a value depends on others of its matrix."""


@dataclass(frozen=True)
class Parts:
    """What one rank trains with.

    Attributes:
        pipeline: how this rank's stages run; None without a pipeline.
        left_whole: modules that the tensor axis could not divide, and why.
    """

    replica: Replica
    pipeline: tuple[Line, Traced] | None
    left_whole: Mapping[str, str]
    optimizer: Optimizer
    schedule: LRScheduler | None
    loader: Loader
    validation: Dataset[Any] | None

    @property
    def model(self) -> nn.Module:
        """What this rank computes."""
        return self.replica.model


@dataclass(frozen=True, kw_only=True)
class Connected:
    """One rank among the others, with connections to them.

    Attributes:
        plan: resolved for so many ranks.
        lanes: for each lane its transports by group.
        aside: a group of all ranks that nobody uses in training; None: there is none.
        place: where this rank stands in a layout whose groups end with a view; None: they do not, or there are none.
    """

    plan: Plan
    topology: Topology
    grid: Grid
    world: World
    lanes: list[dict[str, Transport]]
    device: torch.device
    aside: Group | None = None
    place: Place | None = None


def choose_device(config: ComputeConfig, topology: Topology) -> torch.device:
    """Pick this rank's device.

    Raises:
        MachineError: the plan asks for CUDA, and the node has fewer GPUs than ranks.
    """
    local = topology.local_ranks
    num_gpus = torch.cuda.device_count() if config.device != "cpu" else 0
    if num_gpus >= len(local):
        device = torch.device("cuda", local.index(topology.rank))
        torch.cuda.set_device(device)
        return device
    if config.device == "cuda":
        raise MachineError(
            f"compute.device is cuda, but node {topology.nodes[topology.rank]} has {num_gpus} GPUs for {len(local)} "
            "ranks; start fewer ranks there, or set compute.device to auto or cpu"
        )
    return torch.device("cpu")


def set_threads(config: ComputeConfig, topology: Topology) -> None:
    """Give each rank of a node its part of the cores, unless the plan or OMP_NUM_THREADS says otherwise.

    A container's quota counts, and not what the machine has.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads(cores(), len(topology.local_ranks)))


def build_parts(
    job: Job,
    plan: Plan,
    topology: Topology,
    grid: Grid,
    device: torch.device,
    world: World | None,
    place: Place | None = None,
) -> Parts:
    """Call the job's factories, all ranks from the same seed, and check what they make.

    Args:
        world: over which the models are made equal, collectively; None leaves that to whoever calls.
        place: of this rank in a layout that divides replicas; default: one over torch.distributed's default group.

    Raises:
        JobError: a part is not what it should be; the message names it.
    """
    random_state.seed_all(plan.seed, 0)
    training, validation = _datasets(job)
    loader = Loader(training, _loader_config(plan, device), grid.feed(topology.rank), job.collate)
    _check_size(loader.num_samples, plan, grid)
    divides = plan.layout.ranks_per_replica > 1
    model, deferred = build(job.model, plan.layout.defer_above) if divides else (job.model(), None)
    model = _prepared(model, device)
    _check_tables(model, plan)
    if world is not None:
        make_equal(model, world.everybody, salt=deferred.digest() if deferred else "")
    task = Task(
        example=lambda: _example(job, loader),
        rules=job.tensor,
        bf16=plan.compute.precision == "bf16",
        deferred=deferred,
    )
    if plan.layout.ranks_per_replica == 1:
        divided = Divided(Replica.whole(model))
    else:
        divided = divide(model, place or take_place(plan.layout, grid, topology.rank, device), task)
    replica = divided.replica
    parameters = [held.local for held in replica.held]
    optimizer = job.optimizer(parameters)
    _check_optimizer(optimizer, parameters, replica)
    schedule = job.schedule(optimizer) if job.schedule else None
    random_state.seed_all(plan.seed, grid.dice(topology.rank) + 1)
    return Parts(replica, divided.pipeline, divided.left_whole, optimizer, schedule, loader, validation)


def _example(job: Job, loader: Loader) -> Call:
    """What the first micro-batch calls the model with."""
    _, samples = loader.part(Cursor(), 0).micro_batches[0]
    return call_of(job.loss, samples)


def connect_lanes(
    plan: Plan, topology: Topology, world: World, device: torch.device, pool: MemoryPool | None = None
) -> Connected:
    """Connect this rank to the same part of the other replicas as the plan's sync needs it. Collective.

    `pool`: memory that outlives a view.
    """
    grid = arrange(plan.layout, topology.nodes)
    sync = build_sync(plan, replicas(grid, topology), None)
    made = Lanes(topology, grid, world, device, verify=getattr(plan.sync, "verify", False), pool=pool)
    lanes = [made.build(lane, sync.groups) for lane in range(sync.num_lanes(device.type))]
    return Connected(plan=plan, topology=topology, grid=grid, world=world, lanes=lanes, device=device)


def build_exchange(
    parts: Parts,
    connected: Connected,
    log: EventLog,
    first_step: int = 0,
    among: Among | None = None,
    ledger: Ledger | None = None,
) -> ReplicaExchange:
    """Let this rank take part in the plan's sync, after `first_step` committed steps. Collective."""
    plan = connected.plan
    topology = replicas(connected.grid, connected.topology)
    coder = build_coder(plan, topology)
    sync = build_sync(plan, topology, coder)
    wiring = Wiring(
        replica=parts.replica,
        optimizer=parts.optimizer,
        lanes=connected.lanes,
        topology=topology,
        topology_of_all=connected.topology,
        world=connected.world,
        device=connected.device,
        log=log,
        first_step=first_step,
        among=among,
        ledger=ledger,
    )
    return EXCHANGES[plan.sync.kind](wiring, sync, coder)


def no_effect(connected: Connected, parts: Parts, job: Job) -> list[str]:
    """Settings of the plan or job that change nothing here: one sentence each."""
    idle: list[str] = []
    plan, topology = connected.plan, replicas(connected.grid, connected.topology)
    sync = build_sync(plan, topology, None)
    if plan.codec.kind != "none" and not sync.crosses_network:
        idle.append(
            f"codec {plan.codec.kind} has no effect: all ranks share one node's memory, and nothing goes on a wire"
        )
    if getattr(plan.sync, "form", None) == "hierarchical" and not topology.has_neighbours:
        idle.append("sync.form = hierarchical has no effect: every node has one rank")
    if job.sample is not None and not parts.replica.is_whole:
        idle.append("the job's sample has no effect: no rank holds the whole model")
    if plan.elastic.leave_out_slower_than and not plan.elastic.min_nodes:
        idle.append("elastic.leave_out_slower_than has no effect: under elastic.min_nodes = 0 no worker may leave")
    if job.metrics and parts.validation is None:
        idle.append("the job's metrics have no effect: its data has no validation part")
    return idle


def _datasets(job: Job) -> tuple[Dataset[Any], Dataset[Any] | None]:
    data = job.data()
    pair = data if isinstance(data, tuple) else (data, None)
    training, validation = pair if len(pair) == 2 else (None, None)
    if training is None or not hasattr(training, "__getitem__"):
        raise JobError(
            f"the job's data returned {type(data).__name__}, expected a map-style dataset (__len__ and __getitem__) or "
            "a pair (training, validation)"
        )
    if validation is not None and num_samples(validation) == 0:
        raise JobError("the job's validation data are empty; return only the training data to go without")
    return training, validation


def _loader_config(plan: Plan, device: torch.device) -> LoaderConfig:
    assert plan.batch.shares is not None
    return LoaderConfig(
        seed=plan.seed,
        batch_size=plan.batch.size,
        shares=plan.batch.shares,
        accumulate=plan.batch.accumulate if plan.layout.pipeline == 1 else plan.layout.micro_batches or 1,
        shuffle=plan.data.shuffle,
        drop_last=plan.data.drop_last,
        num_workers=plan.data.workers,
        pin_memory=device.type == "cuda",
        shards=plan.layout.shard,
    )


def _check_size(total: int, plan: Plan, grid: Grid) -> None:
    if total < grid.feeds:
        raise JobError(
            f"the training data has {total} samples, fewer than the {grid.feeds} ranks; start at most "
            f"{max(total, 1)} or bring more data"
        )
    if plan.data.drop_last and total < plan.batch.size:
        raise JobError(
            f"the training data has {total} samples, fewer than batch.size {plan.batch.size}, and data.drop_last "
            "leaves out batches that are not full: nothing would be trained"
        )


def _prepared(model: object, device: torch.device) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise JobError(f"the job's model returned {type(model).__name__}, expected a torch.nn.Module")
    for name, p in model.named_parameters():
        if p.device.type not in ("cpu", "meta", device.type):
            raise JobError(
                f"the model's parameter {name} is on {p.device}, but this rank computes on {device}; build the model "
                "on the CPU, Shoal moves it"
            )
    if not any(p.requires_grad for p in model.parameters()):
        raise JobError("the job's model has no parameter that requires a gradient: there is nothing to train")
    if device.type != "cpu":
        model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))
    return model.train()


def _check_tables(model: nn.Module, plan: Plan) -> None:
    tables = sparse_tables(model)
    if tables and plan.sync.kind != "parameter_server":
        raise JobError(
            f"the model's {tables[0][0]} is a SparseTable, whose rows live on parameter servers, but the plan's sync "
            f"is {plan.sync.kind}; set sync.kind to parameter_server, or use nn.Embedding"
        )


def _check_optimizer(optimizer: object, parameters: Sequence[nn.Parameter], replica: Replica) -> None:
    if not isinstance(optimizer, Optimizer):
        raise JobError(f"the job's optimizer returned {type(optimizer).__name__}, expected a torch.optim.Optimizer")
    known = {id(p) for p in parameters}
    if any(id(p) not in known for group in optimizer.param_groups for p in group["params"]):
        raise JobError("the job's optimizer holds parameters that are not the model's; use those that it is given")
    if not replica.is_whole and type(optimizer).__name__ in _WHOLE_MATRICES:
        raise JobError(
            f"the job's optimizer {type(optimizer).__name__} looks at whole matrices, but each rank of the layout "
            "holds a part of them; take an element-wise one, such as AdamW, or layout.replicate alone"
        )
