"""What ranks with a replica of their own do when a view begins, each sync by its own rule.

Gossip and local steps leave a rank with values that no other has; parameter servers hold the state themselves. After a
loss such ranks may be some steps apart, and bring each other to where all go on: `course.py` (gossip, and rounds at
ranks' own pace), `rounds.py` (local steps), `standing_in.py` (parameter servers that count steps).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from shoal.cluster.views import View
from shoal.cluster.whereabouts import Whereabouts
from shoal.engine.exchange.base import Among
from shoal.engine.exchange.ledger import Ledger
from shoal.engine.own_pace import Round
from shoal.engine.progress import Progress
from shoal.engine.start import Start
from shoal.engine.views.course import Crossing, agree_on_round, lost_samples, make_up
from shoal.engine.views.handover import Outcome
from shoal.engine.views.rounds import Rounds, resume
from shoal.engine.views.standing_in import StandingIn
from shoal.plan import Plan, num_servers
from shoal.run import Run
from shoal.strategy.sync.local import LocalConfig
from shoal.wire.rendezvous import JOIN_TIMEOUT_S


@dataclass
class Carried:
    """What a rank carries from view to view beside its parts.

    Attributes:
        midway: of ranks at their own pace, the round that was broken off.
        ledger: of local steps.
    """

    midway: Round | None = None
    ledger: Ledger | None = None


def among(run: Run, plan: Plan, view: View) -> Among:
    """Who trains in a view, and where the servers are."""
    found = Whereabouts(run).find(num_servers(plan), JOIN_TIMEOUT_S)
    return Among(epoch=view.epoch, seats=view.seats, servers=found.addresses, lost_servers=found.lost)


def go_on_apart(
    crossing: Crossing, carried: Carried, outcome: Outcome, progress: Progress, start: Start, plan: Plan, view: View
) -> None:
    """Bring this rank to where all go on, `outcome.progress`. Collective.

    Args:
        progress: this rank's.
        plan: resolved for the view.

    Raises:
        PeerLostError: another rank vanished meanwhile, and this one took no step; the next view does it again.
    """
    reached, roles = outcome.progress, outcome.roles
    assert reached is not None
    keeping = {seat: outcome.standings[r].step for r, seat in enumerate(view.seats) if r not in roles.takers}
    if getattr(plan.sync, "mode", "") in ("asynchronous", "async"):
        carried.midway = agree_on_round(crossing.world, outcome, carried.midway)
    elif isinstance(plan.sync, LocalConfig):
        _go_on_with_rounds(crossing, carried, outcome, progress, plan.sync, resumes=start.resume)
    elif plan.sync.kind == "parameter_server":
        servers = among(start.run, plan, view)
        StandingIn(among=servers, **vars(crossing)).bring(start.seat, outcome, keeping, reached.step)
    else:
        _go_on_with_gossip(crossing, outcome, progress, keeping, view)


def settle_apart(crossing: Crossing, carried: Carried, outcome: Outcome, view: View) -> None:
    """All are where they go on: begin the view. Collective.

    Raises:
        PeerLostError: another rank vanished meanwhile.
    """
    if carried.ledger is not None:
        Rounds(**vars(crossing)).settle(carried.ledger, outcome, view.seats)


def _go_on_with_rounds(
    crossing: Crossing, carried: Carried, outcome: Outcome, progress: Progress, config: LocalConfig, *, resumes: bool
) -> None:
    assert outcome.progress is not None
    if carried.ledger is None:
        carried.ledger = Ledger.of(crossing.parts.replica, config, outcome.progress.step)
    if outcome.roles.teller is None and resumes:
        resume(carried.ledger, crossing.checkpoints.restore_private(0), crossing.world, crossing.log)
    Rounds(**vars(crossing)).go_on(carried.ledger, outcome, progress)


def _go_on_with_gossip(
    crossing: Crossing, outcome: Outcome, progress: Progress, keeping: dict[int, int], view: View
) -> None:
    course, roles, rank, log = crossing.course, outcome.roles, crossing.world.rank, crossing.log
    assert outcome.progress is not None
    last = outcome.progress.step
    if course is None:
        return
    if rank not in roles.takers and progress.step < last:
        make_up(crossing, progress, last=last)
    if rank != roles.teller:
        return
    for lost in lost_samples(course, keeping, last):
        log.write("samples_lost", **dataclasses.asdict(lost))
    if course.connected.plan.codec.kind != "none":
        log.write("gossip_memory_reset", step=last, epoch=view.epoch)
