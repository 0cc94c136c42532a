"""From one view to the next where every rank has a replica of its own: who goes on from where, and what is lost.

When a rank of a synchronous gossip is lost, the others may be a few steps apart, since each waits for its neighbours
only. They go on together from the step of whoever has come furthest. A rank behind keeps its replica and takes the
steps that it lacks by itself, on its own parts of those batches: so every sample of a survivor is used once. What the
lost rank trained on and no survivor has heard of is lost with it, and told as `samples_lost`; its parts of the steps
that were taken without it count among them. A step under way may have mixed one side of an edge and not the other:
the mean of the replicas may move by as much as they are apart.

Ranks at their own pace go on in the middle of a round (`own_pace.py`): what nobody knows of is leased again. What is
peculiar to local steps is in `rounds.py`.

Only those who trained in the view before go on from their own replicas. Whoever comes back from an earlier one is a
newcomer: its share was reported as lost when the others went on without it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from shoal.data.loader import Loader
from shoal.engine.assemble import assemble
from shoal.engine.build import Connected, Parts
from shoal.engine.checkpoint.session import CheckpointSession
from shoal.engine.exchange.alone import Alone
from shoal.engine.own_pace import Round
from shoal.engine.progress import Progress
from shoal.engine.turnover import Turnover
from shoal.engine.views.handover import Outcome
from shoal.events import EventLog
from shoal.job.job import Job
from shoal.strategy.sync.gossip import GossipConfig, graph_of
from shoal.strategy.sync.reach import reached
from shoal.wire.groups import World, failures_as_lost_peers


@dataclass(frozen=True, kw_only=True)
class Course:
    """How a rank took part in the view that it trained in last.

    Attributes:
        seats: the view's members.
        connected: as it was there; the connections are gone.
        loader: gave this rank its parts.
        start: how far all were when the view began.
        settled: all turned to the next view together, and nothing is held by one rank alone.
    """

    epoch: int
    seats: tuple[int, ...]
    connected: Connected
    loader: Loader
    start: Progress
    settled: bool = False


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """What a rank has in hand on its way into a view.

    Attributes:
        course: of the view that it trained in last; a newcomer has none.
        world: the new view's.
    """

    job: Job
    parts: Parts
    course: Course | None
    world: World
    checkpoints: CheckpointSession
    turnover: Turnover
    log: EventLog


@dataclass(frozen=True, kw_only=True)
class Lost:
    """What went with a rank: its parts of the steps from `first_step` to `last_step`, counted from 1."""

    seat: int
    first_step: int
    last_step: int
    samples: int


def lost_samples(course: Course, standings: Mapping[int, int], step: int) -> Iterator[Lost]:
    """What nobody has of those who trained in `course`'s view and do not go on.

    Args:
        standings: seat -> committed steps, of those who go on.
        step: from which they go on.
    """
    if course.settled:
        return
    config, seats, first = course.connected.plan.sync, course.seats, course.start.step
    assert isinstance(config, GossipConfig)
    ranks = {seats.index(seat): steps for seat, steps in standings.items()}
    for rank, seat in enumerate(seats):
        if rank in ranks:
            continue
        known = reached(lambda s: graph_of(config, len(seats), step=s), first, ranks, rank)
        if known < step:
            samples = sum(share_of(course, rank, ahead) for ahead in range(known - first, step - first))
            yield Lost(seat=seat, first_step=known + 1, last_step=step, samples=samples)


def agree_on_round(world: World, outcome: Outcome, own: Round | None) -> Round | None:
    """The round that all go on with, and what this rank knows of it; None: a new one begins. Collective.

    Args:
        own: the round that this rank was in the middle of.
    """
    teller, standings = outcome.roles.teller, outcome.standings
    if teller is None or not standings[teller].midway:
        return None
    text = None
    if world.rank == teller:
        assert own is not None
        text = json.dumps(own.to_plain()).encode()
    with failures_as_lost_peers("going on with a round"):
        told = Round.from_plain(json.loads(world.tell(text, teller)))
    if world.rank in outcome.roles.takers:
        return told
    is_same = own is not None and standings[world.rank].step == standings[teller].step
    return dataclasses.replace(told, used=own.used if is_same and own is not None else frozenset())


def make_up(crossing: Crossing, progress: Progress, *, last: int, alone: Alone | None = None) -> None:
    """Take this rank's steps up to `last` by itself, as the course divided them. Nobody is waited for.

    Args:
        progress: how far this rank is.
        alone: in place of the exchange; default: that of a gossip.
    """
    course, parts = crossing.course, crossing.parts
    assert course is not None, "whoever has no course has no steps of its own"
    connected = dataclasses.replace(course.connected, world=crossing.world)
    alone = alone or Alone(parts.replica, connected.topology.rank, connected.topology.world_size)
    own = dataclasses.replace(parts, loader=course.loader)
    loop = assemble(
        crossing.job, own, connected, alone, crossing.checkpoints, progress, crossing.turnover, crossing.log
    )
    loop.take_steps(last)
    crossing.log.write("made_up", step=last, steps=last - progress.step)


def share_of(course: Course, rank: int, ahead: int) -> int:
    """Rank `rank`'s samples in the batch `ahead` steps after the view's beginning."""
    cursor, _ = course.loader.after(course.start.cursor, ahead)
    return sum(map(len, course.loader.micro_spans(cursor, rank)))
