"""Starts workers that join a run which goes on elsewhere, follows them, and tells how they ended.

Everything is read from the run's directory, which this machine must see: where the coordinator listens, the plan, the
job. What a worker tells comes from its event log. Who is a member, and when, is the coordinator's business.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from shoal.cluster.invitation import Invitation, ask_coordinator, read_invitation, status_of_run
from shoal.cluster.seats import Seats
from shoal.errors import CoordinatorError, RunError, UsageError
from shoal.events import Event, EventReader
from shoal.launch.attending import has_finished, log_of, start_worker
from shoal.launch.placement import Placement
from shoal.launch.processes import collect, kill_group, signals
from shoal.plan import load_plan
from shoal.run import Run
from shoal.wire.addresses import address_towards, on_network_of

_POLL_S = 0.05
_QUIET_S = 20.0  # without a word of a worker's: then the coordinator is asked whether it is still there
_ANSWER_S = 2.0
_ALONE_S = 60.0
"""For how long a worker that neither trains nor has a coordinator is let try: a launcher starts one within seconds."""
_ALONE_STEPS = 5.0  # or for so many of its steps, if these are longer


@dataclass
class Guest:
    """One worker.

    Attributes:
        step: the last that it committed.
        ended: "" while it runs, then "finished", "left" or "failed".
        message: why it failed.
        heard_at: when it last told something, or its coordinator answered (monotonic seconds).
        step_s: how long its last step took.
    """

    seat: int
    process: subprocess.Popen[bytes]
    reader: EventReader
    step: int = 0
    ended: str = ""
    message: str = ""
    heard_at: float = field(default_factory=time.monotonic)
    step_s: float = 0.0
    is_in: bool = False


class Joining:
    """One `shoal join`. `node`: the name under which its workers join."""

    def __init__(self, run: Run, *, workers: int, address: str | None, notice: Callable[[str], None]) -> None:
        """Make sure that the run can be joined; nothing is started before `follow`.

        Args:
            workers: how many to start.
            address: of this machine, for the other workers; None takes the one that reaches the coordinator.
            notice: is given sentences for the person at the terminal.

        Raises:
            UsageError: the run cannot be joined, or a setting is wrong; the message says why.
            CoordinatorError: its coordinator does not answer.
        """
        if workers < 1:
            raise UsageError(f"--workers got {workers}, expected at least 1")
        self._run = Run(run.path.absolute())
        self._invitation = _invitation(self._run)
        self._address = address or address_towards(self._invitation.address)
        self._network = on_network_of(self._address)
        status_of_run(self._run, self._invitation)
        self._workers = workers
        self._notice = notice
        self._seats = Seats(self._run)
        self._guests: list[Guest] = []
        self._interrupts = 0
        self.node = ""

    def follow(self) -> list[Guest]:
        """Start the workers, follow them, and return once all have ended.

        Raises:
            KeyboardInterrupt: a second Ctrl-C; all have been killed, and the run's other workers go on.
        """
        node = self.node = self._seats.take_node(os.uname().nodename)
        with signals(self._on_signal):
            try:
                for local_rank in range(self._workers):
                    self._start(node, local_rank)
                while any(not guest.ended for guest in self._guests):
                    self._look()
                    time.sleep(_POLL_S)
            finally:
                for guest in self._guests:
                    collect(guest.process)
                self._seats.free_node(node)
        return self._guests

    def _start(self, node: str, local_rank: int) -> None:
        seat = self._seats.take()
        reader = EventReader(self._run.events, f"rank-{seat}.jsonl")
        reader.poll()  # what an earlier attempt's worker of this seat told
        placement = Placement(rank=seat, node=node, local_rank=local_rank, env=self._network)
        process = start_worker(self._run, self._invitation, seat, placement, neighbours=self._workers)
        self._guests.append(Guest(seat, process, reader))
        self._notice(f"seat {seat} on {node} ({self._address}) asks {self._invitation.address} to be let in")
        if self._interrupts:
            process.terminate()

    def _look(self) -> None:
        """What is new."""
        if self._interrupts > 1:
            raise KeyboardInterrupt
        for guest in self._guests:
            if guest.ended:
                continue
            code = guest.process.poll()
            for line in _news(guest, guest.reader.poll()):
                self._notice(line)
            if code is not None:
                self._conclude(guest, code)
            elif self._is_alone(guest):
                guest.ended = "failed"
                guest.message = (
                    f"its coordinator has not answered for {_ALONE_S:.0f} s, and it has not trained: was the run "
                    "killed, or the network cut? `shoal train` --resume goes on from the newest checkpoint"
                )
                kill_group(guest.process.pid)

    def _is_alone(self, guest: Guest) -> bool:
        """Whether it waits for a coordinator that is gone. It may not know: a machine can vanish without a word."""
        quiet_s = time.monotonic() - guest.heard_at
        if quiet_s < _QUIET_S:
            return False
        try:
            ask_coordinator(self._run, self._invitation, {"ask": "status"}, timeout_s=_ANSWER_S)
        except CoordinatorError:
            return quiet_s > max(_ALONE_S, _ALONE_STEPS * guest.step_s)
        guest.heard_at = time.monotonic()
        return False

    def _conclude(self, guest: Guest, code: int) -> None:
        """A worker's process has ended."""
        asked_too_early = code == -signal.SIGTERM and self._interrupts > 0
        if code == 0 and has_finished(self._run, guest.seat, self._invitation.run):
            guest.ended = "finished"
        elif code == 0 or asked_too_early:
            guest.ended = "left"
            others = "; the others go on" if self._interrupts else ""  # else it may be that training ended meanwhile
            self._notice(f"seat {guest.seat} has left after step {guest.step}{others}")
        else:
            guest.ended = "failed"
            guest.message = guest.message or f"its process ended with {code}; see {log_of(self._run, guest.seat)}"

    def _on_signal(self) -> None:
        """A first time hand over and leave, a second time at once."""
        self._interrupts += 1
        if self._interrupts == 1:
            self._notice("leaving: the others take over first; once more leaves at once")
            for guest in self._guests:
                if guest.process.poll() is None:
                    guest.process.terminate()


def _invitation(run: Run) -> Invitation:
    """Where and how to join.

    Raises:
        RunError: there is no such run, it is not elastic, or it is over.
    """
    run.read_info()
    if not load_plan(run.plan).elastic.min_nodes:
        raise RunError(
            f"{run.path} is not an elastic run, its workers are the same from beginning to end; start it with "
            "`shoal train --min-nodes N`"
        )
    return read_invitation(run)


def _news(guest: Guest, events: list[Event]) -> Iterator[str]:
    """Take in what a worker told, and word what a person wants to know of it."""
    seat = f"seat {guest.seat}"
    for event in events:
        guest.heard_at = time.monotonic()
        match event["kind"]:
            case "coordinator_found" if not guest.is_in:
                guest.is_in = True
                yield f"joined as {seat}"
            case "coordinator_found":
                yield f"{seat}: the coordinator is there again"
            case "coordinator_lost":
                yield f"{seat}: the coordinator is not there ({event['message']})"
            case "waiting":
                yield f"{seat} waits: {event['message']}"
            case "view":
                yield f"{seat} trains as one of {len(event['seats'])} from step {event['step']} on: {event['cause']}"
            case "view_lost":
                yield f"{seat}: an exchange failed, and a new view is waited for"
            case "caught_up":
                yield f"{seat} has caught up at step {event['step']}, and takes its share from now on"
            case "step":
                guest.step, guest.step_s = int(event["step"]), float(event.get("step_s") or 0.0)
            case "warning":
                yield f"{seat}: {event['message']}"
            case "error":
                guest.message = str(event["message"])
            case "run_finished":
                yield f"training has ended after step {event['steps']} ({event['reason']})"
