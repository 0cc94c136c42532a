"""Which view comes next: a pure state machine, event in, instructions out.

It knows no sockets, files or clocks: events carry what happened, the time is passed in, and what it answers is to be
followed in order (see `membership_events`). What it must not forget it has recorded; `restore` goes on from there.

A view is made at once when a member of the one before is lost (unplanned), and one at a time for those who come and go
(planned: the next is made when all have entered the last). The idea is that of torchft's quorum and of dask's worker
state machine. Who attends is in `roster`, how far the view at hand has come in `transition`, who is in the next one in
`succession`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from shoal.cluster import succession
from shoal.cluster.membership_events import (
    PLACE,
    Arrived,
    Beat,
    Broken,
    Close,
    Disconnected,
    Ended,
    Entered,
    Event,
    Failed,
    Finished,
    Instruction,
    Leaving,
    MemberEvent,
    Record,
    Rules,
    Send,
    StopAsked,
    Tick,
    Waiting,
)
from shoal.cluster.roster import Attendee, Roster
from shoal.cluster.status import status_of
from shoal.cluster.transition import Transition
from shoal.cluster.views import Document, View, ViewMember
from shoal.errors import CoordinatorError


class Membership:
    """The state. `handle` is the only way to change it; it is deterministic."""

    def __init__(self, rules: Rules, *, now: float) -> None:
        """Begin without members. `now` counts seconds from anywhere, and never falls."""
        self.rules = rules
        self.stale: Counter[str] = Counter()
        self._roster = Roster(rules)
        self._at_hand = Transition()
        self._deferred: list[MemberEvent] = []  # of newcomers during recovery
        self._finishing: str | None = None
        self._end: Document | None = None
        self._since = self._ticked = now
        self._out: list[Instruction] = []

    def handle(self, events: Iterable[Event], now: float) -> list[Instruction]:
        """Take in what happened together, then decide. Returns what to do, in order."""
        gap_s = now - self._ticked
        if gap_s > self.rules.lease_s / 2:
            self._absorb(gap_s, now)
        for event in events:
            self._take(event, now)
        self._decide(now)
        out, self._out = self._out, []
        return out

    def restore(self, records: Iterable[Document], now: float) -> None:
        """Go on from what an earlier coordinator recorded: who lived then has `lease_s` to come back.

        Raises:
            CoordinatorError: these are another run's records, or no records.
        """
        for record in records:
            try:
                self._replay(record, now)
            except (KeyError, TypeError, AttributeError) as error:
                raise CoordinatorError(f"the coordinator's log is damaged: {error!r} in {record}") from None
            self._out = []  # what followed from it was done then

    @property
    def view(self) -> View | None:
        """The view at hand."""
        return self._at_hand.view

    @property
    def epoch(self) -> int:
        """The view's, 0 before the first."""
        return self._at_hand.epoch

    def status(self) -> Document:
        """What there is to see; see `status_of`."""
        finishing = self._finishing is not None
        return status_of(self._roster, self._at_hand, finishing=finishing, end=self._end, stale=self.stale)

    def _take(self, event: Event, now: float) -> None:
        match event:
            case Tick():
                self._ticked = now
                for attendee in self._roster.expired(now):
                    self._expire(attendee, now)
            case Disconnected(member=member, how=how):
                self._deferred = [deferred for deferred in self._deferred if deferred.member != member]
                self._depart(member, how)
            case Ended(member=member, seat=seat, how=how):
                holder = self._roster.holder(seat) if member is None and seat is not None else None
                gone = holder.member if holder else member
                if gone is not None and self._roster.get(gone):
                    self._depart(gone, how)
                    self._out.append(Close(gone))
            case StopAsked():
                self._out.extend(Send(a.member, {"kind": "stop"}) for a in self._roster if a.attached)
            case Arrived():
                self._arrive(event, now)
            case MemberEvent():
                self._hear(event, now)

    def _hear(self, event: MemberEvent, now: float) -> None:
        attendee = self._roster.get(event.member)
        if attendee is None or not attendee.attached:
            if any(deferred.member == event.member for deferred in self._deferred):
                self._deferred.append(event)
            return
        attendee.heard_at = now
        match event:
            case Beat(epoch=epoch, step=step):
                attendee.step = step
                self._is_open(attendee, epoch, "beat")
            case Entered(epoch=epoch):
                if self._is_open(attendee, epoch, "entered") and attendee.entered < epoch == self.epoch:
                    self._at_hand.enter(attendee, self._roster)
            case Broken(epoch=epoch, reason=reason):
                if self._is_open(attendee, epoch, "broken"):
                    self._at_hand.fail(attendee, epoch, reason, now)
            case Leaving() if not attendee.leaving:
                attendee.leaving = True
                self._record("leaving", member=attendee.member)
            case Finished(reason=reason):
                self._finish(attendee, reason)
            case Failed(message=message):
                self._over(f"{attendee.label} failed: {message}", failed=True)

    def _arrive(self, hello: Arrived, now: float) -> None:
        known = self._roster.get(hello.member)
        if self._end is not None or (self._finishing is not None and known is None):
            self._turn_away(hello.member, self._end or _end_of(self._finishing))
        elif known is None and self._roster.recovering:  # its seat may be that of somebody who is about to come back
            self._deferred.append(hello)
            restarted = Waiting(PLACE, "the coordinator restarted and waits for all")
            self._send(hello.member, "waiting", **restarted._asdict())
        elif (reason := self._roster.refusal(hello, self.epoch)) is not None:
            self._turn_away(hello.member, {"kind": "refused", "reason": reason})
            self._depart(hello.member, f"it was refused: {reason}")
        elif known is not None:
            self._attach_again(known, hello, now)
        else:
            self._admit(hello, now)

    def _admit(self, hello: Arrived, now: float) -> None:
        if self._roster.fingerprint is None:
            self._roster.fingerprint = dict(hello.fingerprint)
            self._record("run", run=self.rules.run, fingerprint=dict(hello.fingerprint))
        seat = self._roster.free_seat() if hello.seat is None else hello.seat
        identity: dict[str, Any] = {"member": hello.member, "seat": seat, "node": hello.node, "store": hello.store}
        self._roster.add(Attendee(**identity, heard_at=now, step=hello.step))
        self._record("member", **identity)
        self._send(hello.member, "welcome", seat=seat, epoch=self.epoch)

    def _attach_again(self, attendee: Attendee, hello: Arrived, now: float) -> None:
        attendee.attached, attendee.heard_at, attendee.step, attendee.told = True, now, hello.step, None
        self._send(attendee.member, "welcome", seat=attendee.seat, epoch=self.epoch)
        if self.view is not None and self._at_hand.takes_part(attendee) and hello.epoch < self.epoch:
            self._send(attendee.member, "view", view=self.view.to_plain())

    def _is_open(self, attendee: Attendee, epoch: int, kind: str) -> bool:
        """Whether what it says of view `epoch` still says something; otherwise it is counted."""
        if not self._at_hand.takes_part(attendee):
            return False
        if epoch in self._at_hand.open_epochs:
            return True
        self.stale[kind] += 1
        return False

    def _finish(self, attendee: Attendee, reason: str) -> None:
        if attendee.finished or not self._at_hand.takes_part(attendee):
            return
        attendee.finished = True
        self._record("finished", member=attendee.member, reason=reason)
        if self._finishing is None:
            self._finishing = reason
            waiting = [a for a in self._roster if not self._at_hand.takes_part(a)]
            self._out.extend(Send(a.member, _end_of(reason)) for a in waiting)

    def _expire(self, attendee: Attendee, now: float) -> None:
        if attendee.attached:
            self._depart(attendee.member, f"silent for {now - attendee.heard_at:.1f} s")
            self._out.append(Close(attendee.member))
        else:
            self._depart(attendee.member, "did not come back after the coordinator restarted")

    def _depart(self, member: str, how: str) -> None:
        attendee = self._roster.get(member)
        if attendee is not None:
            self._at_hand.lose(attendee, how)
            self._roster.remove(member)
            self._record("gone", member=member, how=how)

    def _absorb(self, gap_s: float, now: float) -> None:
        """We were stopped ourselves: that nobody was heard in that time says nothing about them."""
        self._ticked = now
        self._since += gap_s
        self._roster.shift(gap_s, now)

    def _decide(self, now: float) -> None:
        if self._deferred and not self._roster.recovering:
            deferred, self._deferred = self._deferred, []
            for event in deferred:
                self._take(event, now)
        if self._end is not None:
            return
        if self._finishing is not None:
            self._end_when_all_have()
        elif not self._roster.recovering:
            self._make_what_is_due(now)
            self._tell_who_waits()

    def _make_what_is_due(self, now: float) -> None:
        at_hand, roster, rules = self._at_hand, self._roster, self.rules
        if at_hand.view is None:
            first = succession.first_members(roster, rules, late=now - self._since >= rules.form_s)
            if first is not None:
                self._make(first, "start", planned=False)
        elif at_hand.losses or at_hand.settled(roster, now, rules.settling_s):
            unplanned = succession.survivors(roster, at_hand, rules)
            if unplanned is not None:
                self._make(*unplanned, planned=False)
        elif not at_hand.broken(roster) and at_hand.entered_by_all:
            planned = succession.changed(roster, at_hand, rules)
            if planned is not None:
                self._make(*planned, planned=True)

    def _make(self, members: list[Attendee], cause: str, *, planned: bool) -> None:
        members = sorted(members, key=lambda attendee: attendee.seat)
        seated = tuple(ViewMember(seat=a.seat, node=a.node, store=a.store) for a in members)
        view = View(run=self.rules.run, epoch=self.epoch + 1, members=seated, planned=planned, cause=cause)
        concerned = [a for a in self._roster if a in members or self._at_hand.takes_part(a)]
        holders = [a.member for a in members]
        self._record("view", view=view.to_plain(), holders=holders)
        self._at_hand.begin(view, holders, self._roster)
        for attendee in concerned:
            attendee.told = None
            self._send(attendee.member, "view", view=view.to_plain())

    def _end_when_all_have(self) -> None:
        assert self._finishing is not None
        at_hand = self._at_hand
        training = [a for a in self._roster if a.member in at_hand.running or at_hand.hands_over(a)]
        # Who says broken now waits for a view that will never be made.
        if all(attendee.finished or attendee.broken for attendee in training):
            self._over(self._finishing, failed=False)

    def _over(self, reason: str, *, failed: bool) -> None:
        if self._end is None:
            self._end = {"kind": "end", "reason": reason, "failed": failed}
            self._out.append(Record(self._end))
            self._out.extend(Send(a.member, self._end) for a in self._roster if a.attached)

    def _tell_who_waits(self) -> None:
        for attendee in self._roster:
            waiting = succession.waits_for(attendee, self._roster, self._at_hand, self.rules)
            if waiting is not None and waiting != attendee.told:
                attendee.told = waiting
                self._send(attendee.member, "waiting", **waiting._asdict())

    def _record(self, kind: str, **fields: Any) -> None:
        self._out.append(Record({"kind": kind, **fields}))

    def _send(self, member: str, kind: str, **fields: Any) -> None:
        self._out.append(Send(member, {"kind": kind, **fields}))

    def _turn_away(self, member: str, document: Document) -> None:
        self._out += [Send(member, document), Close(member)]

    def _replay(self, record: Document, now: float) -> None:
        match record["kind"]:
            case "run":
                if record["run"] != self.rules.run:
                    raise CoordinatorError(f"this is the log of run {record['run']}, and not of {self.rules.run}")
                self._roster.fingerprint = dict(record["fingerprint"])
            case "member":
                identity = {name: record[name] for name in ("member", "seat", "node", "store")}
                self._roster.add(Attendee(**identity, heard_at=now, attached=False))
            case "gone":
                self._depart(record["member"], record["how"])
            case "view":
                self._at_hand.begin(View.from_plain(record["view"]), record["holders"], self._roster)
            case "leaving":
                self._roster[record["member"]].leaving = True
            case "finished":
                self._roster[record["member"]].finished = True
                self._finishing = self._finishing or record["reason"]
            case "end":
                self._end = record
            case other:
                raise CoordinatorError(f"the coordinator's log holds a record of unknown kind {other!r}")


def _end_of(reason: str | None) -> Document:
    return {"kind": "end", "reason": reason, "failed": False}
