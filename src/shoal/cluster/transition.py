"""The view at hand, and how far its members have come into it: entered, switching, broken, or in need of another.

Part of the state machine of `membership`, and as pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from shoal.cluster.roster import Attendee, Roster
from shoal.cluster.views import View


@dataclass(kw_only=True)
class Transition:
    """`current` and `before` are the members' ids of the view at hand and of the one before it.

    `losses` are the sentences for what broke the view at hand. `left_early` tells of a leaver that was gone before all
    had entered the view without it: as a rule it had handed over, but if an exchange broke, then by that.
    """

    view: View | None = None
    current: set[str] = field(default_factory=set)
    before: set[str] = field(default_factory=set)
    losses: list[str] = field(default_factory=list)
    left_early: str = ""
    entered_by_all: bool = True

    @property
    def epoch(self) -> int:
        """The view's, 0 before the first."""
        return self.view.epoch if self.view else 0

    @property
    def switching(self) -> bool:
        """Whether members of the view before may still train there."""
        return self.view is not None and self.view.planned and not self.entered_by_all

    @property
    def open_epochs(self) -> tuple[int, ...]:
        """The views that a member may be in without being late."""
        return (self.epoch, self.epoch - 1) if self.switching else (self.epoch,)

    @property
    def running(self) -> set[str]:
        """Those of the view at hand whose training is under way: newcomers of a planned view only prepare."""
        return self.current & self.before if self.switching else self.current

    def hands_over(self, attendee: Attendee) -> bool:
        """Whether it leaves, and the view without it has not been entered by all yet."""
        return (
            self.switching
            and attendee.leaving
            and attendee.member in self.before
            and attendee.member not in self.current
        )

    def takes_part(self, attendee: Attendee) -> bool:
        """Whether it trains in the view at hand, or still in the one before."""
        return attendee.member in self.current or self.hands_over(attendee)

    def begin(self, view: View, holders: Iterable[str], roster: Roster) -> None:
        """A new view: what was said about the one before no longer counts."""
        self.before, self.current, self.view = self.current, set(holders), view
        self.losses, self.left_early = [], ""
        self.entered_by_all = False
        for attendee in roster:
            attendee.broken = ""

    def enter(self, attendee: Attendee, roster: Roster) -> None:
        """A member is in the view at hand; with the last of them, those who left are free to go."""
        attendee.entered = self.epoch
        if attendee.broken_in < self.epoch:
            attendee.broken = ""
        inside = {a.member for a in roster if a.entered == self.epoch}
        if not self.entered_by_all and self.current <= inside:
            self.entered_by_all = True

    def fail(self, attendee: Attendee, epoch: int, reason: str, now: float) -> None:
        """An exchange of a member failed, in the view at hand or in the one before."""
        if not attendee.broken:
            attendee.broken = f"{attendee.label} could not exchange: {reason}"
            attendee.broken_in, attendee.broken_at = epoch, now

    def lose(self, attendee: Attendee, how: str) -> None:
        """An attendee is gone."""
        if attendee.member in self.current:
            self.losses.append(f"{attendee.label}: {how}")
        elif self.hands_over(attendee):
            self.left_early = f"{attendee.label} left early: {how}"

    def broken(self, roster: Roster) -> list[Attendee]:
        """Those who wait for a new view because an exchange failed, the first first."""
        return sorted((a for a in roster if a.broken and self.takes_part(a)), key=lambda attendee: attendee.broken_at)

    def settled(self, roster: Roster, now: float, settle_s: float) -> bool:
        """Whether a broken exchange is explained, or nothing will explain it any more."""
        broken = self.broken(roster)
        if not broken:
            return False
        return (
            bool(self.left_early)
            or now - broken[0].broken_at >= settle_s
            or all(attendee.broken for attendee in roster if attendee.member in self.running)
        )
