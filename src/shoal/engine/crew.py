"""What a training loop is made of: its settings, and the parts that it calls upon."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from shoal.engine.build import Parts
from shoal.engine.checkpoint.cadence import Cadence
from shoal.engine.checkpoint.session import CheckpointSession
from shoal.engine.computation import Computation
from shoal.engine.division import Division
from shoal.engine.exchange import ReplicaExchange
from shoal.engine.lookout import Lookout
from shoal.engine.own_pace import OwnPace
from shoal.engine.pace import InStep
from shoal.engine.patience import Endless, Watch
from shoal.engine.shards.copies import Copies
from shoal.engine.shards.gate import Gate
from shoal.engine.stopping import StopRule
from shoal.engine.stopwatch import Stopwatch
from shoal.engine.turnover import Turnover
from shoal.engine.validation import Validator
from shoal.engine.views.newcomer import Newcomer
from shoal.engine.views.travelling import Giving
from shoal.events import EventLog
from shoal.wire.groups import World


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What the loop needs of the plan.

    Attributes:
        weight: this rank's part of every batch; all ranks' sum to 1.
        validate_every, checkpoint_every: periods in steps; 0: never.
        layout: the sizes of the axes.
        writes_pieces: of the ranks that hold the same values, this one writes them into checkpoints.
        survives: a step may fail and be taken again.
    """

    rank: int
    weight: float
    clip_norm: float | None
    validate_every: int
    checkpoint_every: int
    keep_best: bool
    writes_pieces: bool
    layout: Mapping[str, int]
    survives: bool = False


@dataclass(frozen=True, kw_only=True)
class Crew:
    """The parts that the loop calls upon.

    Attributes:
        lookout: names slow ranks; None where ranks do not tell how long they take.
        cadence: says when checkpoints are due; None where the plan does.
        patience: is told when this rank does its own work, and waits for nobody.
        newcomer, giving: of a rank that comes into a view without state, and of one that gives it some.
        gate, copies: where ranks that come and go hold a replica together; None elsewhere, and without copies.
    """

    parts: Parts
    computation: Computation
    stopwatch: Stopwatch
    exchange: ReplicaExchange
    checkpoints: CheckpointSession
    validator: Validator | None
    pace: InStep | OwnPace
    division: Division
    stop_rule: StopRule
    turnover: Turnover
    world: World
    log: EventLog
    lookout: Lookout | None = None
    cadence: Cadence | None = None
    newcomer: Newcomer | None = None
    giving: Giving | None = None
    patience: Watch = field(default_factory=Endless)
    gate: Gate | None = None
    copies: Copies | None = None
