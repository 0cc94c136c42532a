"""When a view begins, every rank gets the state of those who have come furthest.

After a failure some ranks may have committed a step that others have not; a newcomer has nothing yet; and ranks whose
parameters differ although they should not must hear of it. So all compare how far they are and what they hold
(`standing.py`), and who is behind takes everything from those ahead (`travelling.py`). What becomes of steps that a
rank lacks is `course.py`'s.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shoal.engine.build import Parts
from shoal.engine.checkpoint import tree
from shoal.engine.layout.optimizer_state import named_state
from shoal.engine.progress import Progress
from shoal.engine.views.standing import NOTHING, Roles, Standing, digest_of, roles, roles_apart
from shoal.engine.views.travelling import Giving, Taking
from shoal.wire.group import Group
from shoal.wire.groups import World, failures_as_lost_peers


@dataclass(frozen=True)
class Outcome:
    """What came of comparing.

    Attributes:
        progress: how far all are now; None: nobody has any state.
        giving: this rank's part of the state, to be sent to others in the background, once it has begun.
        taking: what this rank is sent in the background; until it is there, the rank has no state of its own.
        standings: of all ranks, before.
    """

    progress: Progress | None
    roles: Roles
    standings: Sequence[Standing]
    giving: Giving | None = None
    taking: Taking | None = None

    def begin(self) -> None:
        """Let the state travel. Only now: what training waits for comes first."""
        for travelling in (self.giving, self.taking):
            if travelling is not None:
                travelling.begin()


def hand_over(
    world: World,
    parts: Parts,
    progress: Progress | None,
    aside: Group | None,
    *,
    epoch: int = 0,
    apart: bool = False,
    midway: bool = False,
) -> Outcome:
    """Give all ranks of a view a state to go on from. Collective.

    Args:
        progress: how far this rank is; None if it has no state.
        aside: a group of all ranks that nobody else uses; over it the state travels in the background. None: all wait
            until it has arrived.
        epoch: of the view that this rank trained in last.
        apart: every rank has a replica of its own; otherwise all are to be equal.
        midway: this rank is in the middle of a round.

    Raises:
        PeerLostError: a rank vanished meanwhile, or a piece arrived damaged.
    """
    own = Standing(NOTHING, NOTHING, 0)
    if progress is not None:
        # Who turns to a planned view has just trained with the others, and compared when that view began.
        digest = 0 if apart or aside is not None else digest_of(parts.model)
        own = Standing(progress.step, progress.validated_step, digest, epoch, int(midway))
    with failures_as_lost_peers("handing state over"):
        standings = _compare(world, own)
        part = (roles_apart if apart else roles)(standings)
        if part.teller is None:
            return Outcome(None, part, standings)
        return dataclasses.replace(_transfer(world, parts, progress, part, aside), standings=standings)


def _compare(world: World, own: Standing) -> list[Standing]:
    mine = torch.tensor(dataclasses.astuple(own), dtype=torch.int64)
    rows = [torch.empty_like(mine) for _ in range(world.size)]
    world.everybody.all_gather(rows, mine)
    return [Standing(*row.tolist()) for row in rows]


def _transfer(world: World, parts: Parts, progress: Progress | None, part: Roles, aside: Group | None) -> Outcome:
    document: Any = None
    tensors: dict[str, Tensor] = {}
    if world.rank in part.givers and part.takers:
        document, unordered = tree.encode(_state(parts), "state")
        # By name: an optimizer's state is in the order in which parameters were first used, on each rank its own.
        tensors = dict(sorted(unordered.items()))
    text = None
    if world.rank == part.teller:
        assert progress is not None
        described = {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()}
        text = json.dumps({"progress": progress.to_plain(), "state": document, "tensors": described}).encode()
    assert part.teller is not None
    message = json.loads(world.tell(text, part.teller))
    reached = Progress.from_plain(message["progress"])
    if progress is not None:
        reached = dataclasses.replace(reached, seconds=max(reached.seconds, progress.seconds))
    group = aside or world.everybody
    if world.rank in part.takers:
        taking = Taking(group, message, part)
        if aside is not None:
            return Outcome(reached, part, (), taking=taking)
        taking.take()
        taking.install(parts)
    elif part.takers and world.rank in part.givers:
        giving = Giving(group, [tensor.detach() for tensor in tensors.values()], part, world.rank)
        if aside is not None:
            return Outcome(reached, part, (), giving=giving)
        giving.give()
    return Outcome(reached, part, ())


def _state(parts: Parts) -> dict[str, Any]:
    return {
        "model": parts.replica.state_dict(),
        "optimizer": named_state(parts.optimizer, parts.replica),
        "schedule": parts.schedule.state_dict() if parts.schedule else None,
    }
