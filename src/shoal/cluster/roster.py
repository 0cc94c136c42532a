"""Who attends: each member that the coordinator knows to live, its seat, its lease, and who may come in at all.

Part of the state machine of `membership`, and as pure: time is passed in, nothing is sent from here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from shoal.cluster.membership_events import Arrived, Fingerprint, Rules, Waiting


@dataclass(kw_only=True)
class Attendee:
    """One member, from its first hello until it is gone. `attached`: its connection is up (False after a restart)."""

    member: str
    seat: int
    node: str
    store: str
    heard_at: float
    attached: bool = True
    step: int = -1
    entered: int = 0  # the last view it said to be connected in
    broken: str = ""  # why an exchange failed since the view at hand was made,
    broken_in: int = 0  # in which view,
    broken_at: float = 0.0  # and when
    leaving: bool = False
    finished: bool = False
    told: Waiting | None = None  # the last `waiting`

    @property
    def label(self) -> str:
        """How to call it in a sentence."""
        return f"seat {self.seat} on {self.node}"


@dataclass
class Roster:
    """All attendees, in order of arrival."""

    rules: Rules
    fingerprint: Fingerprint | None = None
    _attendees: dict[str, Attendee] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Attendee]:
        return iter(self._attendees.values())

    def get(self, member: str) -> Attendee | None:
        """The attendee of that id, if it is here."""
        return self._attendees.get(member)

    def __getitem__(self, member: str) -> Attendee:
        return self._attendees[member]

    def holder(self, seat: int) -> Attendee | None:
        """Who holds `seat`."""
        return next((a for a in self._attendees.values() if a.seat == seat), None)

    def add(self, attendee: Attendee) -> None:
        """Let in."""
        self._attendees[attendee.member] = attendee

    def remove(self, member: str) -> Attendee | None:
        """Strike off, if it is here."""
        return self._attendees.pop(member, None)

    @property
    def recovering(self) -> bool:
        """Whether somebody that the log knows has not come back yet."""
        return not all(a.attached for a in self._attendees.values())

    def free_seat(self) -> int:
        """The lowest seat that nobody holds."""
        taken = {a.seat for a in self._attendees.values()}
        return next(seat for seat in range(len(taken) + 1) if seat not in taken)

    def expired(self, now: float) -> list[Attendee]:
        """Those whose lease has run out."""
        return [a for a in self._attendees.values() if now - a.heard_at > self.rules.lease_s]

    def shift(self, gap_s: float, now: float) -> None:
        """Nobody could be heard for `gap_s`, by our own fault: it does not count."""
        for attendee in self._attendees.values():
            attendee.heard_at = min(now, attendee.heard_at + gap_s)
            attendee.broken_at = min(now, attendee.broken_at + gap_s)

    def refusal(self, hello: Arrived, epoch: int) -> str | None:
        """Why `hello` is not let in, or None. `epoch`: the coordinator's own."""
        if hello.run != self.rules.run:
            return f"this coordinator is run {self.rules.run}'s, and not {hello.run}'s: is its address right?"
        if hello.epoch > epoch:
            return f"knows view {hello.epoch}, but this coordinator only reached {epoch}: two coordinators?"
        return self._difference(hello) or self._conflict(hello)

    def _difference(self, hello: Arrived) -> str | None:
        expected, got = self.fingerprint, hello.fingerprint
        if expected is None or expected == got:
            return None
        name = next(key for key in expected | got if key not in expected or expected[key] != got.get(key, self))
        return (
            f"its {name} is {got.get(name)}, the other members' is {expected.get(name)}; start all with the same plan, "
            "job and versions"
        )

    def _conflict(self, hello: Arrived) -> str | None:
        own = self.get(hello.member)
        if own is not None and hello.seat not in (None, own.seat):
            return f"it holds seat {own.seat}, and now claims seat {hello.seat}"
        holder = None if hello.seat is None or own is not None else self.holder(hello.seat)
        return None if holder is None else f"seat {hello.seat} is held by a member on {holder.node}, which is alive"
