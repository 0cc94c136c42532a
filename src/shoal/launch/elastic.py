"""Starts workers that come and go, and their coordinator; watches them, and reports their end.

Who is a member is the coordinator's business: here processes are started, and started again where the plan says so.
Workers that `shoal join` started are others' processes, but this run's members: as long as they train it is not over.
The run has failed when no worker came to its end.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

from shoal.cluster.faults import Fault
from shoal.cluster.membership_events import Rules
from shoal.cluster.seats import Seats
from shoal.cluster.whereabouts import Whereabouts
from shoal.events import EventLog, EventReader
from shoal.launch.attending import has_finished, start_worker
from shoal.launch.audience import Audience
from shoal.launch.coordinator import CoordinatorProcess, Serving
from shoal.launch.failure import explain
from shoal.launch.injector import Injector
from shoal.launch.joined import Joined
from shoal.launch.lab.lab import Lab
from shoal.launch.placement import Placement, Seating
from shoal.launch.processes import ask_to_stop, kill_group, signals, tell
from shoal.launch.servers import FAILED, Servers
from shoal.launch.workers import Worker, Workers
from shoal.run import Run
from shoal.wire.tls import Tls

_POLL_S = 0.02
_WATCH_S = 0.1
_DISK_PATIENCE_S = 60.0
_GRACE_S = 5.0  # beyond the lease: for workers that do not end although the run has


@dataclass(frozen=True, kw_only=True)
class Membership:
    """Who is to train, of the plan's `[elastic]` and the command line.

    Attributes:
        nodes: workers to start with.
        restarts: how often a worker that died is started again in its place.
        servers: parameter servers to start beside the workers.
        tls: by what the coordinator's connections are encrypted.
    """

    nodes: int
    min_nodes: int
    max_nodes: int
    lease_s: float
    restarts: int
    servers: int = 0
    tls: Tls | None = None


class ElasticSupervisor:
    """Runs workers to the end of training. It is the injector's `Hands`."""

    def __init__(
        self,
        seating: Seating,
        run: Run,
        membership: Membership,
        audience: Audience,
        *,
        resume: bool,
        faults: Sequence[Fault] = (),
        lab: Lab | None = None,
    ) -> None:
        """Prepare; `run_to_the_end` starts the processes.

        Args:
            seating: at least as many placements as workers to start with; the others are for those that join later.
            faults: what to rehearse.
            lab: where links can be cut.
        """
        self.run = run
        self.lab = lab
        self._seating = seating
        self._membership = membership
        self._audience = audience
        self._faults = faults
        self._workers = Workers()
        self._servers = Servers(run)
        self._whereabouts = Whereabouts(run)
        self._attempt = str(run.read_info()["id"])
        self._seats = Seats(run)
        self._coordinator = CoordinatorProcess(run, seating, self._serving(resume))
        self._joined = Joined(self._seats, self._coordinator, patience_s=membership.lease_s + _GRACE_S)
        self._failed: dict[int, int] = {}
        self._restarted: dict[int, int] = {}
        self._interrupts = 0
        self._since = 0.0

    def run_to_the_end(self) -> None:
        """Start the coordinator and the workers, and wait for all.

        Raises:
            WorkerFailedError: no worker came to the end of training; the message tells why.
            CoordinatorError: the coordinator could not be started.
            KeyboardInterrupt: a second Ctrl-C; all workers have been killed.
        """
        self._since = time.time()
        reader = EventReader(self.run.events)
        reader.poll()  # a resumed run's past
        with (
            signals(self._on_signal),
            EventLog(self.run.events / "launcher.jsonl", "launcher", patience_s=_DISK_PATIENCE_S) as log,
        ):
            injector = Injector(self._faults, self, log) if self._faults else None
            try:
                self._take_seats()
                self._start_coordinator(log)
                self._servers.start(self._seating, self._membership.servers, {})
                for placement in self._seating.placements[: self._membership.nodes]:
                    self._start(placement.rank, placement)
                self._follow(reader, log, injector)
                self._audience.watch(reader.poll())
                if not self._came_to_its_end():
                    raise explain(self.run, self._failed, since=self._since)
            finally:
                if injector is not None:
                    injector.close()
                self._workers.close()
                self._servers.close()
                self._coordinator.close()

    # What the injector needs.

    def seats(self) -> list[int]:
        """Every seat there has been, or will be at the start."""
        return sorted(set(self._workers.latest()) | set(range(self._membership.nodes)))

    def node_of(self, seat: int) -> str:
        """The name of a seat's node."""
        worker = self._workers.latest().get(seat)
        return worker.placement.node if worker else self._seating.placements[seat].node

    def pid_of(self, seat: int) -> int | None:
        """The seat's process, if it runs."""
        worker = self._workers.running(seat)
        return worker.process.pid if worker is not None else None

    def coordinator_pid(self) -> int | None:
        """The coordinator's process, if it runs."""
        process = self._coordinator.process
        return process.pid if process is not None and process.poll() is None else None

    def kill(self, seat: int) -> None:
        """End a worker and its helpers at once."""
        worker = self._workers.running(seat)
        if worker is not None:
            kill_group(worker.process.pid)

    def preempt(self, seat: int) -> None:
        """Ask a worker to leave, as a machine that is taken away does."""
        worker = self._workers.running(seat)
        if worker is not None:
            worker.process.terminate()

    def tell(self, seat: int, line: str) -> None:
        """Write a line to a worker's standard input."""
        worker = self._workers.running(seat)
        if worker is not None:
            tell(worker.process, line)

    def start_worker(self) -> int:
        """Start one more worker: on the first placement that has none, else beside others. Returns its seat."""
        latest = self._workers.latest()
        taken = {worker.placement.rank for worker in latest.values() if worker.runs}
        free = [placement for placement in self._seating.placements if placement.rank not in taken]
        is_new = bool(free) and free[0].rank not in latest
        seat = free[0].rank if is_new else self._seats.take()
        placement = free[0] if free else self._seating.placements[seat % len(self._seating.placements)]
        self._start(seat, placement)
        return seat

    def _take_seats(self) -> None:
        """Before anybody else can: those of all placements, and their nodes' names."""
        for _ in self._seating.placements:
            self._seats.take()
        for node in dict.fromkeys(placement.node for placement in self._seating.placements):
            self._seats.take_node(node)

    def _serving(self, resume: bool) -> Serving:
        wanted = self._membership
        rules = Rules(
            run=self._attempt,
            expected=wanted.nodes,
            min_nodes=wanted.min_nodes,
            max_nodes=wanted.max_nodes,
            lease_s=wanted.lease_s,
        )
        return Serving(rules=rules, resume=resume, tls=wanted.tls)

    def _start_coordinator(self, log: EventLog) -> None:
        """Start it, or start it again where it listened before."""
        log.write("coordinator_started", address=self._coordinator.start())

    def _check_servers(self) -> None:
        for index, code in self._servers.ended().items():
            self._whereabouts.mark_lost(index)
            if code == FAILED:
                raise explain(self.run, {}, since=self._since)

    def _start(self, seat: int, placement: Placement) -> None:
        assert self._coordinator.invitation is not None
        neighbours = [other.node for other in self._seating.placements].count(placement.node)
        process = start_worker(self.run, self._coordinator.invitation, seat, placement, neighbours=neighbours)
        self._workers.add(seat, placement, process)
        if self._interrupts:
            ask_to_stop(process)

    def _follow(self, reader: EventReader, log: EventLog, injector: Injector | None) -> None:
        watch_at, deadline = 0.0, float("inf")
        while True:
            now = time.monotonic()
            for worker in self._workers.ended():
                self._report(worker, log)
                if worker.process.returncode == 0 and self._has_finished(worker.seat):
                    deadline = min(deadline, now + self._membership.lease_s + _GRACE_S)
            if self._workers.all_ended and not self._joined.remain(stop=self._interrupts > 0):
                return
            if self._interrupts > 1:
                raise KeyboardInterrupt
            if self._coordinator.is_gone():
                self._start_coordinator(log)
            if now > deadline:
                self._workers.kill()
            self._check_servers()
            events = reader.poll() if injector is not None or now >= watch_at else []
            if injector is not None:
                injector.observe(events)
            if events or now >= watch_at:
                watch_at = now + _WATCH_S
                self._audience.watch(events)
            time.sleep(_POLL_S)

    def _report(self, worker: Worker, log: EventLog) -> None:
        """A worker's process has ended: note it, and start it again if the plan wants that."""
        code, seat = worker.process.returncode, worker.seat
        log.write("worker_exited", rank=seat, pid=worker.process.pid, exit_code=code)
        kill_group(worker.process.pid)  # what it started and left
        if code in (0, -signal.SIGTERM) or worker.killed:  # asked to leave before it could hear that, maybe
            return
        self._failed[seat] = code
        restarted = self._restarted.get(seat, 0)
        if restarted < self._membership.restarts and code < 0 and not self._interrupts:
            self._restarted[seat] = restarted + 1
            self._start(seat, worker.placement)

    def _came_to_its_end(self) -> bool:
        """Whether any worker did. Another machine's log may be seen a moment later than its worker's end."""
        joined = self._joined.seats()
        seats = joined | {worker.seat for worker in self._workers if worker.process.returncode == 0}
        deadline = time.monotonic() + (_GRACE_S if joined else 0.0)
        while not (ended := any(self._has_finished(seat) for seat in seats)) and time.monotonic() < deadline:
            time.sleep(_WATCH_S)
        return ended

    def _has_finished(self, seat: int) -> bool:
        return has_finished(self.run, seat, self._attempt)

    def _on_signal(self) -> None:
        self._interrupts += 1
        if self._interrupts == 1:
            self._audience.notice("stopping after this step and saving a checkpoint; once more stops at once")
            self._workers.ask_to_stop()
