"""Members and a coordinator without processes: what the state machine answers is delivered, recorded, or lost.

A `World` is one run. Its members behave as workers do (hello, beats, entering views, going when they may), unless a
test makes them fall silent or vanish; the coordinator can be killed, and goes on from its records. Every view that it
makes is held against what a view may be.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from typing import Any

from shoal.cluster.membership import Membership
from shoal.cluster.membership_events import (
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
    Leaving,
    Record,
    Rules,
    Send,
    Tick,
)
from shoal.cluster.views import Document, View

FINGERPRINT: dict[str, Any] = {"plan": "abc", "job": "charlm"}


@dataclass
class Member:
    """One simulated worker."""

    name: str
    seat: int | None = None
    connected: bool = False
    silent: bool = False  # stopped: beats, enters and answers nothing
    over: str = ""  # why it will never come again
    view: View | None = None
    entered: int = 0
    broken: int = 0
    leaving: bool = False
    finished: bool = False
    inbox: list[Document] = field(default_factory=list)

    @property
    def epoch(self) -> int:
        return self.view.epoch if self.view else 0

    def told(self, kind: str) -> list[Document]:
        """All documents of a kind that it was sent."""
        return [document for document in self.inbox if document["kind"] == kind]


class World:
    """A coordinator, its log, and members by name."""

    def __init__(self, *, expected: int = 3, least: int = 2, most: int = 4, **times: float) -> None:
        self.rules = Rules(run="r", expected=expected, min_nodes=least, max_nodes=most, **times)
        self.now = 1000.0
        self.records: list[Document] = []
        self.members: dict[str, Member] = {}
        self.views: list[View] = []
        self.over = False
        self.holders: list[str] = []
        self.machine = Membership(self.rules, now=self.now)

    # -- what happens

    def come(self, *names: str, seat: int | None = None, **fields: Any) -> None:
        """Members say hello, together; known ones again."""
        events: list[Event] = []
        for name in names:
            member = self.members.setdefault(name, Member(name, seat))
            assert not member.connected
            member.connected, member.silent = True, False
            says = {"seat": member.seat, "epoch": member.epoch, "run": "r", "fingerprint": FINGERPRINT} | fields
            events.append(Arrived(member=name, node=f"node-{name}", store=f"{name}:1", step=-1, **says))
            events += self._still_holds(member)
        self.do(*events)

    def enter(self, *names: str) -> None:
        """Members are connected in the newest view that they know (all members of it, if none is named)."""
        for name in names or [n for n, m in self.members.items() if self._may_enter(m)]:
            member = self.members[name]
            member.entered = member.epoch
            self.do(Entered(member=name, epoch=member.epoch))

    def lose(self, *names: str, how: str = "its connection broke") -> None:
        """Processes die, in the same moment."""
        for name in names:
            self.members[name].connected, self.members[name].over = False, "killed"
        self.do(*(Disconnected(member=name, how=how) for name in names))

    def ended(self, seat: int, how: str = "exit code 1") -> None:
        self.do(Ended(seat=seat, how=how))

    def fail_exchange(self, *names: str, epoch: int | None = None) -> None:
        for name in names:
            member = self.members[name]
            member.broken = member.entered if epoch is None else epoch
            self.do(Broken(member=name, epoch=member.broken, reason="connection reset"))

    def leave(self, name: str) -> None:
        self.members[name].leaving = True
        self.do(Leaving(member=name))

    def finish(self, name: str) -> None:
        self.members[name].finished = True
        self.do(Finished(member=name, reason="100 steps"))

    def fail(self, name: str) -> None:
        self.do(Failed(member=name, message="no space left"))

    def wait(self, seconds: float, *, step_s: float = 0.25) -> None:
        """Time passes; who is not silent beats."""
        until = self.now + seconds
        while self.now < until - 1e-9:
            self.now += min(step_s, until - self.now)
            beats = [m for m in self.members.values() if m.connected and not m.silent]
            self.do(*(Beat(member=m.name, epoch=m.entered, step=0) for m in beats))
            self.do(Tick())

    def restart(self) -> None:
        """kill -9 of the coordinator, and a new one on its log. Every connection is gone."""
        for member in self.members.values():
            member.connected = False
        self.machine = Membership(self.rules, now=self.now)
        self.machine.restore(json.loads(json.dumps(self.records)), self.now)
        self.do(Tick())

    def do(self, *events: Event, deliver: bool = True) -> None:
        """Let the machine handle events. `deliver` False: it is killed after its records are on disk."""
        for instruction in self.machine.handle(events, self.now):
            match instruction:
                case Record(document):
                    self.records.append(document)
                    self._check(document)
                case Send(name, document) if deliver and self.members[name].connected:
                    self._receive(self.members[name], document)
                case Close(name) if deliver:
                    self.members[name].connected = False

    # -- what there is

    @property
    def view(self) -> View:
        return self.views[-1]

    @property
    def causes(self) -> list[str]:
        return [view.cause for view in self.views]

    @property
    def state(self) -> str:
        return str(self.machine.status()["state"])

    def seats(self) -> list[int]:
        """Those of the newest view."""
        return list(self.view.seats)

    # -- how members behave

    def _receive(self, member: Member, document: Document) -> None:
        member.inbox.append(document)
        match document:
            case {"kind": "welcome", "seat": seat}:
                member.seat = seat
            case {"kind": "view", "view": view}:
                member.view = View.from_plain(view)
                member.broken = 0
            case {"kind": "refused" | "end" as kind}:
                member.over = kind

    def _may_enter(self, member: Member) -> bool:
        return (
            member.connected
            and not member.silent
            and member.view is not None
            and member.entered < member.epoch
            and member.seat in member.view.seats
        )

    def _still_holds(self, member: Member) -> list[Event]:
        said: list[Event] = []
        if member.entered and member.entered == member.epoch:
            said.append(Entered(member=member.name, epoch=member.entered))
        if member.broken:
            said.append(Broken(member=member.name, epoch=member.broken, reason="connection reset"))
        if member.leaving:
            said.append(Leaving(member=member.name))
        if member.finished:
            said.append(Finished(member=member.name, reason="100 steps"))
        return said

    # -- what must hold

    def _check(self, record: Document) -> None:
        match record["kind"]:
            case "view":
                self._check_view(View.from_plain(record["view"]), record["holders"])
            case "finished" | "end":
                self.over = True

    def _check_view(self, view: View, holders: list[str]) -> None:
        assert not self.over, "a view after the end"
        assert view.epoch == (self.view.epoch if self.views else 0) + 1
        assert self.rules.min_nodes <= len(view.members) <= self.rules.max_nodes
        assert len(set(view.seats)) == len(view.seats) == len(holders)
        for seat, name in zip(view.seats, holders, strict=True):
            member = self.members[name]
            assert member.connected, f"{name} is in view {view.epoch}, and is gone"
            assert member.seat in (None, seat)
        self.views.append(view)
        self.holders = holders

    # -- chance

    def something(self, dice: random.Random) -> None:
        """One random thing that can happen now."""
        here = [n for n, m in self.members.items() if m.connected]
        awake = [n for n in here if not self.members[n].silent]
        away = [n for n, m in self.members.items() if not m.connected and not m.over]
        match dice.choices(
            ["come", "back", "lose", "silent", "broken", "enter", "leave", "wait", "restart", "finish", "ended"],
            [16, 20, 4, 2, 6, 30, 2, 10, 3, 0.2, 1],
        )[0]:
            case "come" if len(self.members) < 20:
                lost = [m.seat for m in self.members.values() if m.over and m.seat is not None]
                name = f"m{len(self.members)}"
                self.come(name, seat=dice.choice([None, *lost]))
            case "back" if away:
                self.come(*dice.sample(away, dice.randint(1, len(away))))
            case "lose" if here:
                self.lose(*dice.sample(here, min(len(here), dice.choice([1, 1, 2, 3]))))
            case "silent" if awake:
                self.members[dice.choice(awake)].silent = True
            case "broken" if awake:
                for name in dice.sample(awake, dice.randint(1, len(awake))):
                    if self.members[name].entered:
                        self.fail_exchange(name, epoch=self.members[name].entered - dice.choice([0, 0, 0, 1]))
            case "enter":
                ready = [n for n, m in self.members.items() if self._may_enter(m)]
                for name in dice.sample(ready, dice.randint(0, len(ready))):
                    self.enter(name)
            case "leave" if awake:
                self.leave(dice.choice(awake))
            case "wait":
                self.wait(dice.choice([0.1, 0.5, 2.0, 6.0]))
            case "restart":
                self._crash(dice)
            case "finish" if awake:
                name = dice.choice(awake)
                if dice.random() < 0.2:
                    self.fail(name)
                elif self.members[name].entered:
                    self.finish(name)
            case "ended" if here:
                name = dice.choice(here)
                self.members[name].over = "killed"
                self.do(Ended(member=name, how="exit code 1"))

    def _crash(self, dice: random.Random) -> None:
        """At any moment: also between a decision's records and its sending."""
        here = [name for name, member in self.members.items() if member.connected]
        if here and dice.random() < 0.5:
            name = dice.choice(here)
            self.members[name].connected, self.members[name].over = False, "killed"
            self.do(Disconnected(member=name), deliver=False)
        self.restart()

    def calm(self) -> None:
        """From now on all who live behave, and those who may go do. Long enough for everything to settle."""
        for _ in range(60):
            for member in list(self.members.values()):
                member.silent = False
                if not member.connected and not member.over:
                    self.come(member.name)
            self.enter()
            for member in list(self.members.values()):
                if member.connected and member.leaving and member.name not in self.holders:
                    self.lose(member.name)
                elif member.connected and self.over and not member.finished:
                    self.finish(member.name)
            self.wait(0.5)
