"""From one view to the next where ranks take local steps: one anchor for all, and nobody's learning twice.

A fragment's round is merged by somebody only after everybody's difference has left. So when a rank is lost, each of the
others has merged as many rounds of a fragment as the furthest, or one fewer, and then that round is on its way there.
Who is behind takes anchor and outer momentum from those ahead, and keeps its own steps since then as in any round. A
round that nobody has merged never happened: its samples count again in the next. Then a rank that is behind in steps
takes them by itself. What the lost rank had learned since the last round is lost with it, and told.

Anchors and momentum of those who have merged as much are compared; the majority's go to the rest, which is named.
A newcomer begins from the anchor, with another's optimizer (`handover.py`) and nothing learned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shoal.engine.exchange.alone import CountedAlone
from shoal.engine.exchange.ledger import Held, Ledger
from shoal.engine.progress import Progress
from shoal.engine.views.course import Course, Crossing, Lost, make_up, share_of
from shoal.engine.views.handover import Outcome
from shoal.engine.views.standing import Roles, Standing, digest, roles
from shoal.engine.views.travelling import Giving, Taking
from shoal.events import EventLog
from shoal.wire.groups import World, failures_as_lost_peers

_NOTHING = Standing(-1, -1, 0)


@dataclass(frozen=True)
class Word:
    """What one rank says when a view begins; lists have one entry for each fragment.

    Attributes:
        merged: rounds that are over.
        digests: of anchors and momentum.
        every, base: the rhythm; 0: not yet measured.
    """

    merged: tuple[int, ...]
    digests: tuple[int, ...]
    every: int
    base: int


def givers_and_takers(words: Sequence[Word | None]) -> list[Roles]:
    """For each fragment, who gives its anchor and who takes it. None: a newcomer's word."""
    said = [word for word in words if word is not None]
    return [
        roles([_NOTHING if word is None else Standing(word.merged[f], -1, word.digests[f]) for word in words])
        for f in range(len(said[0].merged) if said else 0)
    ]


def rhythm_of(words: Sequence[Word | None]) -> tuple[int, int]:
    """(every, base) of whoever has settled them; (0, 0): nobody has."""
    return max(((word.every, word.base) for word in words if word is not None and word.every), default=(0, 0))


def lost_since(
    course: Course, known: Mapping[int, Sequence[Held]], agreed: Sequence[int], staying: set[int], step: int
) -> Iterator[Lost]:
    """What nobody has of those who trained in `course`'s view and do not go on.

    Args:
        known: by seat, what each held of every fragment when that view began.
        agreed: for each fragment, the step after which the last round left that somebody has merged.
        staying: the seats that go on.
        step: from which they go on.

    Fragments leave at different steps: what is named is lost of the oldest, and of others less.
    """
    start = course.start.step
    for rank, seat in enumerate(course.seats):
        if seat in staying:
            continue
        pairs = zip(agreed, known[seat], strict=True)
        since = [(left, 0) if left > start else (held.since, held.samples) for left, held in pairs]
        first, before = min(since, key=lambda pair: (pair[0], -pair[1]))
        if first < step:
            samples = before + sum(share_of(course, rank, n) for n in range(max(first - start, 0), step - start))
            yield Lost(seat=seat, first_step=first + 1, last_step=step, samples=samples)


@dataclass(frozen=True, kw_only=True)
class Rounds(Crossing):
    """One rank's part in it."""

    def go_on(self, ledger: Ledger, outcome: Outcome, progress: Progress) -> None:
        """Bring this rank to where all go on. Collective.

        Args:
            outcome: of handing over; this rank's parts are those of `progress`.

        Raises:
            PeerLostError: another rank vanished meanwhile, and this one took no step; the next view does it again.
        """
        if outcome.roles.teller is None:
            return
        assert outcome.progress is not None
        last = outcome.progress.step
        with failures_as_lost_peers("going on with the rounds of local steps"):
            self._agree(ledger, outcome, last)
        if self.course is not None and self.world.rank not in outcome.roles.takers and progress.step < last:
            topology = self.course.connected.topology
            alone = CountedAlone(self.parts.replica, topology.rank, topology.world_size, ledger)
            make_up(self, progress, last=last, alone=alone)

    def settle(self, ledger: Ledger, outcome: Outcome, seats: Sequence[int]) -> None:
        """All are there: tell what is lost, and begin the view with what its members, `seats`, have. Collective.

        Raises:
            PeerLostError: another rank vanished meanwhile.
        """
        assert outcome.progress is not None
        with failures_as_lost_peers("telling who has learned how much"):
            known = self._ask(ledger, seats)
        if self.world.rank == outcome.roles.teller and self.course is not None:
            agreed = [fragment.held.since for fragment in ledger.fragments]
            staying = {seat for rank, seat in enumerate(seats) if rank not in outcome.roles.takers}
            for lost in lost_since(self.course, ledger.known, agreed, staying, outcome.progress.step):
                self.log.write("samples_lost", **dataclasses.asdict(lost))
            if self.course.connected.plan.codec.kind != "none":
                self.log.write("residuals_reset", step=outcome.progress.step)
        ledger.known = known
        for fragment, held in zip(ledger.fragments, zip(*known.values(), strict=True), strict=True):
            fragment.undo()
            fragment.all_samples = sum(own.samples for own in held)

    def _agree(self, ledger: Ledger, outcome: Outcome, step: int) -> None:
        """One anchor, momentum and rhythm for all."""
        is_new = self.world.rank in outcome.roles.takers
        words = self._hear(ledger, outcome.roles.takers)
        merged = [fragment.merged for fragment in ledger.fragments]
        every, base = rhythm_of(words)
        if every:
            ledger.every, ledger.base = every, base
        taken = []
        for index, (fragment, part) in enumerate(zip(ledger.fragments, givers_and_takers(words), strict=True)):
            self._spread(fragment.tensors, part)
            most = max(word.merged[index] for word in words if word is not None)
            if is_new:
                fragment.begin_at(step, most)
            elif self.world.rank in part.takers and fragment.merged < most:
                fragment.take_over(ledger.config, overlaps=ledger.overlaps)
                taken.append(index)
            self._tell_of_differing(index, part)
        if not is_new and self.course is not None:
            undone = [index for index, fragment in enumerate(ledger.fragments) if fragment.leaving is not None]
            self.log.write("rounds", epoch=self.course.epoch, step=step, merged=merged, taken=taken, undone=undone)

    def _hear(self, ledger: Ledger, newcomers: Sequence[int]) -> list[Word | None]:
        fragments = ledger.fragments
        merged, digests = [f.merged for f in fragments], [digest(f.tensors) for f in fragments]
        rows = self._gather([ledger.every, ledger.base, *merged, *digests])
        count = len(fragments)
        return [
            None if rank in newcomers else Word(tuple(row[2 : 2 + count]), tuple(row[2 + count :]), row[0], row[1])
            for rank, row in enumerate(rows)
        ]

    def _ask(self, ledger: Ledger, seats: Sequence[int]) -> dict[int, list[Held]]:
        """By seat, what every member holds of each fragment."""
        rows = self._gather([number for fragment in ledger.fragments for number in fragment.held])
        return {
            seat: [Held(*pair) for pair in zip(row[::2], row[1::2], strict=True)]
            for seat, row in zip(seats, rows, strict=True)
        }

    def _gather(self, numbers: Sequence[int]) -> list[list[int]]:
        own = torch.tensor(numbers, dtype=torch.int64)
        rows = [torch.empty_like(own) for _ in range(self.world.size)]
        self.world.everybody.all_gather(rows, own)
        return [row.tolist() for row in rows]

    def _spread(self, tensors: list[Tensor], part: Roles) -> None:
        """Give the givers' tensors to the takers, who change theirs when all have arrived."""
        if self.world.rank in part.takers:
            described = {str(i): [str(t.dtype).removeprefix("torch."), list(t.shape)] for i, t in enumerate(tensors)}
            taking = Taking(self.world.everybody, {"tensors": described}, part)
            taking.take()
            for tensor, taken in zip(tensors, taking.tensors.values(), strict=True):
                tensor.copy_(taken)
        elif part.takers and self.world.rank in part.givers:
            Giving(self.world.everybody, tensors, part, self.world.rank).give()

    def _tell_of_differing(self, index: int, part: Roles) -> None:
        for rank in part.differing if self.world.rank == part.teller else []:
            self.log.write(
                "warning",
                message=f"rank {rank} held another anchor of fragment {index} than the rest after as many rounds; it "
                "was given theirs",
            )


def resume(ledger: Ledger, saved: Mapping[str, Any] | None, world: World, log: EventLog) -> None:
    """Begin from a checkpoint's anchors, with the momentum and rhythm that rank 0 had; what each rank alone had learned
    since is in none of them. `saved`: what rank 0 alone held; None: nothing.
    """
    missing = ledger.resume(saved) if saved else 0
    if missing and world.rank == 0:
        log.write(
            "warning",
            message=f"training begins from the parameters that all ranks had agreed on: what they had learned from "
            f"{missing} samples since then was each rank's own, and is gone",
        )
