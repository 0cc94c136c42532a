"""Makes the faults of a rehearsal happen, each when its step has been committed, and ends those that last.

It reads from the run's own events how far each rank is, so a fault comes within a poll of the event it waits for: the
ranks may be some short steps further by then. It decides nothing about the run: who is still a member, and what is
done again, is left to those who have to find out by themselves, as after a real failure.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from shoal.cluster.faults import Fault, require_without_lab
from shoal.errors import FaultsError, MachineError, ShoalError, nearest
from shoal.events import Event, EventLog
from shoal.launch.damage import flip_byte, require_small_disk
from shoal.launch.hardship import Hardship, Hardships
from shoal.launch.lab.lab import Lab
from shoal.run import Run


class Hands(Protocol):
    """What the injector needs of the launcher. A seat is a rank's number at the start; who joins takes the next."""

    @property
    def run(self) -> Run:
        """The run directory."""

    @property
    def lab(self) -> Lab | None:
        """The emulated cluster, if the run is in one. It must stay up until the injector is closed."""

    def seats(self) -> Sequence[int]:
        """Every seat there has been, in order; before the start, every seat that will be taken."""

    def node_of(self, seat: int) -> str:
        """The name of the seat's node, also when its worker is gone."""

    def pid_of(self, seat: int) -> int | None:
        """The seat's process, which leads a group of its own; None when it has ended or not begun."""

    def coordinator_pid(self) -> int | None:
        """The coordinator's process; None when there is none."""

    def kill(self, seat: int) -> None:
        """End a worker and its helpers at once (SIGKILL)."""

    def preempt(self, seat: int) -> None:
        """Ask a worker to leave, as a machine that is taken away does (SIGTERM)."""

    def tell(self, seat: int, line: str) -> None:
        """Write a line to a worker's standard input; `line` comes without its newline."""

    def start_worker(self) -> object:
        """Start one more worker, which joins the run. What is returned is not used."""


class Injector:
    """Owned by the launcher and called from one thread. Close it in every case, before the log and the lab."""

    def __init__(self, faults: Sequence[Fault], hands: Hands, log: EventLog) -> None:
        """Prepare; nothing happens before `observe`.

        Args:
            faults: in order of step, as `schedule` returns them.
            log: gets `fault_injected`, `fault_ended`, and a `warning` for what could not be done.

        Raises:
            FaultsError: one cannot be rehearsed here: a link without a lab, an unknown node, a disk too large to fill.
        """
        for fault in faults:
            _require_possible(fault, hands)
        self._pending = list(faults)
        self._hands = hands
        self._log = log
        self._hardships = Hardships(hands.lab, hands.run.path)
        self._steps: dict[int, int] = {}  # seat -> the last step that it committed
        self._training: dict[int, int | None] = {}  # seat -> the process that took a step, and waits for no place
        self._doomed: set[int] = set()  # processes that were struck and may not have ended yet

    def observe(self, events: Sequence[Event]) -> None:
        """Take note of new events (of the source `rank-SEAT`), do what is due, and end what has run out."""
        told = [(seat, event) for event in events if (seat := _seat_of(event)) is not None]
        seen = [(seat, int(event["step"])) for seat, event in told if event["kind"] == "step"]
        if seen and not self._steps:
            self._leave_out_the_past(min(step for _, step in seen))
        for seat, step in seen:
            self._steps[seat] = max(step, self._steps.get(seat, 0))
        for seat, event in told:
            if event["kind"] == "step":
                self._training[seat] = self._hands.pid_of(seat)
            elif event["kind"] == "waiting":
                self._training.pop(seat, None)
        self.tick(time.monotonic())

    def tick(self, now: float) -> None:
        """As `observe` without news. `now` is the time on the monotonic clock, in seconds."""
        for hardship in list(self._hardships.under_way):
            if now >= hardship.until:
                self._end(hardship, now, "its time was over")
            elif hardship.pids and not hardship.pids & set(self._living(hardship.seats).values()):
                self._end(hardship, now, "its processes are gone")
        for fault in list(self._pending):
            if self._is_due(fault) and self._inject(fault, now):
                self._pending.remove(fault)

    def close(self) -> None:
        """Undo all that lasts, and say what never happened. Does nothing the second time."""
        now = time.monotonic()
        for hardship in list(self._hardships.under_way):
            self._end(hardship, now, "the run is over")
        if self._pending:
            self._warn(f"{_counted(self._pending)}: never happened, because the run ended before it could")
        self._pending = []

    def _leave_out_the_past(self, first: int) -> None:
        """A resumed run has these behind it."""
        past = [fault for fault in self._pending if fault.step < first]
        self._pending = [fault for fault in self._pending if fault.step >= first]
        if past:
            self._warn(f"{_counted(past)}: left out, because this attempt began at step {first}")

    def _is_due(self, fault: Fault) -> bool:
        if fault.rank is not None and fault.spare is None:
            waited_for: Sequence[int] = (fault.rank,)
        else:
            waited_for = tuple(self._steps) if fault.node is None else self._seats_on(fault.node)
        return any(self._steps.get(seat, 0) >= fault.step for seat in waited_for)

    def _inject(self, fault: Fault, now: float) -> bool:
        """Do it, or say why it cannot be done. False where it has to wait."""
        aimed = self._aimed(fault)
        if aimed is None:
            return False
        fault = aimed
        node = fault.node or ("" if fault.rank is None else self._hands.node_of(fault.rank))
        seats = self._struck(fault, node)
        if not self._leaves_enough(fault, seats):
            return False
        try:
            if fault.rule.lasting:
                self._begin(fault, node, seats, now)
            elif (detail := self._strike(fault, seats)) is not None:
                self._say("fault_injected", fault, node, fault.seconds, detail)
            else:
                return False
        except (ShoalError, OSError) as mistake:
            self._warn(f"the {fault} could not be done: {mistake}")
        return True

    def _aimed(self, fault: Fault) -> Fault | None:
        """A drawn fault strikes the next rank where its own is not at work any more; None where nobody is."""
        at_work = self._at_work()
        if fault.spare is None or fault.rank is None or fault.rank in at_work:
            return fault
        later = [seat for seat in at_work if seat > fault.rank]
        return replace(fault, rank=(later or at_work)[0]) if at_work else None

    def _struck(self, fault: Fault, node: str) -> tuple[int, ...]:
        if fault.rank is not None and not fault.rule.needs_lab:
            return (fault.rank,)
        return self._seats_on(node)  # a link is a node's, and so all its ranks'

    def _leaves_enough(self, fault: Fault, seats: tuple[int, ...]) -> bool:
        """Whether the spare ranks of a drawn fault stay at work."""
        stops_work = fault.rule.idling or fault.rule.removing
        return not stops_work or len(set(self._at_work()).difference(seats)) >= (fault.spare or 0)

    def _at_work(self) -> list[int]:
        """The seats whose worker trains, has not been told to go, and is neither frozen nor cut off.

        To lose one that waits for a place, or has only been started, would be no loss.
        """
        living, idle = (
            self._living(sorted(self._training)),
            self._hardships.idle_seats.union(
                seat for seat, pid in self._training.items() if pid != self._hands.pid_of(seat)
            ),
        )
        return [seat for seat, pid in living.items() if seat not in idle and pid not in self._doomed]

    def _seats_on(self, node: str) -> tuple[int, ...]:
        return tuple(seat for seat in self._hands.seats() if self._hands.node_of(seat) == node)

    def _living(self, seats: Sequence[int]) -> dict[int, int]:
        return {seat: pid for seat in seats if (pid := self._hands.pid_of(seat)) is not None}

    def _begin(self, fault: Fault, node: str, seats: tuple[int, ...], now: float) -> None:
        holds = fault.kind in ("freeze", "slow")
        living = _some(self._living(seats), seats) if holds else {}
        hardship = Hardship(
            fault=fault,
            node=node,
            seats=tuple(living) if holds else seats,
            pids=frozenset(living.values()),
            since=now,
        )
        # Said before it is done: a full disk has no room for it.
        self._say("fault_injected", fault, node, fault.seconds, self._hardships.describe(hardship))
        try:
            self._hardships.begin(hardship)
        except (ShoalError, OSError) as mistake:
            self._end(hardship, now, f"it could not be done: {mistake}")

    def _end(self, hardship: Hardship, now: float, detail: str) -> None:
        try:
            self._hardships.end(hardship)
        except (ShoalError, OSError) as mistake:
            detail += f", but it could not be undone: {mistake}"
        self._say("fault_ended", hardship.fault, hardship.node, now - hardship.since, detail)

    def _strike(self, fault: Fault, seats: tuple[int, ...]) -> str | None:
        """Do what strikes once, and say what was done; None where it has to wait."""
        hands = self._hands
        match fault.kind:
            case "join":
                hands.start_worker()
                return "one more worker was started"
            case "kill_coordinator":
                return _kill_coordinator(hands)
            case "flip_checkpoint":
                return flip_byte(hands.run.checkpoints, fault.seed)
            case "flip_message":
                return self._to_each(seats, lambda seat: hands.tell(seat, "flip"), "told to flip a byte of a message")
            case "kill":
                return self._to_each(seats, hands.kill, "killed", dooms=True)
            case "preempt":
                return self._to_each(seats, hands.preempt, "asked to leave", dooms=True)
            case _:
                raise AssertionError(fault.kind)

    def _to_each(self, seats: tuple[int, ...], act: Callable[[int], None], done: str, *, dooms: bool = False) -> str:
        living = _some(self._living(seats), seats)
        if dooms:
            self._doomed |= set(living.values())
        for seat in living:
            act(seat)
        return f"{done}: {', '.join(f'rank {seat} (process {pid})' for seat, pid in living.items())}"

    def _say(self, kind: str, fault: Fault, node: str, seconds: float | None, detail: str) -> None:
        fields = {"rank": fault.rank, "node": node or None, "step": fault.step, "seconds": seconds, "detail": detail}
        self._write(kind, fault=fault.kind, **fields)

    def _warn(self, message: str) -> None:
        self._write("warning", message=message)

    def _write(self, kind: str, **fields: Any) -> None:
        with contextlib.suppress(MachineError):  # of a disk that is full; the log keeps some lines for later
            self._log.write(kind, **fields)


def _require_possible(fault: Fault, hands: Hands) -> None:
    where = fault.origin
    if hands.lab is None:
        require_without_lab(fault)
    nodes = list(dict.fromkeys(hands.node_of(seat) for seat in hands.seats()))
    if fault.node is not None and fault.node not in nodes:
        known = ", ".join(nodes)
        raise FaultsError(f"{where}: node: got {fault.node!r}, expected one of {known}{nearest(fault.node, nodes)}")
    if fault.kind == "slow_link":
        _require_rate(fault, hands, where)
    if fault.kind == "fill_disk":
        try:
            require_small_disk(hands.run.path)
        except FaultsError as mistake:
            raise FaultsError(f"{where}: {mistake}") from None


def _require_rate(fault: Fault, hands: Hands, where: str) -> None:
    assert hands.lab is not None
    own = fault.node or next((hands.node_of(seat) for seat in hands.seats() if seat == fault.rank), None)
    for node in hands.lab.cluster.nodes:
        if node.link is None and (fault.spare is not None or node.name == own):
            raise FaultsError(
                f"{where}: slow_link divides a rate, and the link of {node.name} has none: give it one "
                "(--lab nodes=4,link=100mbit)"
            )


def _seat_of(event: Event) -> int | None:
    """The seat of the worker that told it; None where another process did."""
    name, _, number = str(event["source"]).partition("-")
    return int(number) if name == "rank" and number.isdigit() else None


def _counted(faults: Sequence[Fault]) -> str:
    return str(faults[0]) if len(faults) == 1 else f"{faults[0]} and {len(faults) - 1} more faults"


def _some(living: dict[int, int], seats: Sequence[int]) -> dict[int, int]:
    if not living:
        raise FaultsError(f"no process is left of rank {', '.join(map(str, seats))}")
    return living


def _kill_coordinator(hands: Hands) -> str:
    pid = hands.coordinator_pid()
    if pid is None:
        raise FaultsError("there is no coordinator")
    os.kill(pid, signal.SIGKILL)
    return f"process {pid} was killed"
