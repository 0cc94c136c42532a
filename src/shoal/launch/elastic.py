"""Starts workers that come and go, and their coordinator; watches them, and reports their end.

Who is a member is the coordinator's business: here processes are started, and started again where the plan says so.
The run has failed when no worker came to its end.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shoal.cluster.faults import Fault
from shoal.cluster.whereabouts import Whereabouts
from shoal.errors import CoordinatorError
from shoal.events import Event, EventLog, EventReader
from shoal.launch.failure import explain
from shoal.launch.injector import Injector
from shoal.launch.lab.lab import Lab
from shoal.launch.placement import Placement, Seating
from shoal.launch.processes import ask_to_stop, collect, kill_group, open_process, signals, tell
from shoal.run import Run, write_atomic

_POLL_S = 0.02
_WATCH_S = 0.1
_READY_S = 30.0
_DISK_PATIENCE_S = 60.0
_GRACE_S = 5.0  # beyond the lease: for workers that do not end although the run has


@dataclass(frozen=True, kw_only=True)
class Membership:
    """Who is to train, of the plan's `[elastic]` and the command line.

    Attributes:
        nodes: workers to start with.
        restarts: how often a worker that died is started again in its place.
        servers: parameter servers to start beside the workers.
    """

    nodes: int
    min_nodes: int
    max_nodes: int
    lease_s: float
    restarts: int
    servers: int = 0


@dataclass
class _Worker:
    seat: int
    placement: Placement
    process: subprocess.Popen[bytes]
    reported: bool = False
    killed: bool = False


@dataclass
class _Coordinator:
    """Where it listens, once it does; `token` lets members in."""

    folder: Path
    token: str = field(default_factory=lambda: secrets.token_hex(16))
    address: str = ""
    process: subprocess.Popen[bytes] | None = None


class ElasticSupervisor:
    """Runs workers to the end of training. It is the injector's `Hands`."""

    def __init__(
        self,
        seating: Seating,
        run: Run,
        membership: Membership,
        *,
        resume: bool,
        watch: Callable[[list[Event]], None],
        notice: Callable[[str], None],
        faults: Sequence[Fault] = (),
        lab: Lab | None = None,
    ) -> None:
        """Prepare; `run_to_the_end` starts the processes.

        Args:
            seating: at least as many placements as workers to start with; the others are for those that join later.
            watch: is given new events a few times a second, and once at the end.
            notice: is given sentences for the person at the terminal.
            faults: what to rehearse.
            lab: where links can be cut.
        """
        self.run = run
        self.lab = lab
        self._seating = seating
        self._membership = membership
        self._resume = resume
        self._watch = watch
        self._notice = notice
        self._faults = faults
        self._workers: list[_Worker] = []  # all there have been; of one seat, the last one counts
        self._servers: list[subprocess.Popen[bytes]] = []
        self._ended_servers: set[int] = set()
        self._whereabouts = Whereabouts(run)
        self._coordinator = _Coordinator(run.path / "coordinator")
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
                self._start_coordinator(log)
                self._start_servers()
                for placement in self._seating.placements[: self._membership.nodes]:
                    self._start(placement.rank, placement)
                self._follow(reader, log, injector)
                self._watch(reader.poll())
                if not any(worker.process.returncode == 0 and self._has_finished(worker) for worker in self._workers):
                    raise explain(self.run, self._failed, since=self._since)
            finally:
                if injector is not None:
                    injector.close()
                self._end_all()

    # What the injector needs.

    def seats(self) -> list[int]:
        """Every seat there has been, or will be at the start."""
        return sorted({worker.seat for worker in self._workers} | set(range(self._membership.nodes)))

    def node_of(self, seat: int) -> str:
        """The name of a seat's node."""
        worker = self._latest().get(seat)
        return worker.placement.node if worker else self._seating.placements[seat].node

    def pid_of(self, seat: int) -> int | None:
        """The seat's process, if it runs."""
        worker = self._latest().get(seat)
        return worker.process.pid if worker and worker.process.poll() is None else None

    def coordinator_pid(self) -> int | None:
        """The coordinator's process, if it runs."""
        process = self._coordinator.process
        return process.pid if process is not None and process.poll() is None else None

    def kill(self, seat: int) -> None:
        """End a worker and its helpers at once."""
        pid = self.pid_of(seat)
        if pid is not None:
            kill_group(pid)

    def preempt(self, seat: int) -> None:
        """Ask a worker to leave, as a machine that is taken away does."""
        worker = self._latest().get(seat)
        if worker is not None and worker.process.poll() is None:
            worker.process.terminate()

    def tell(self, seat: int, line: str) -> None:
        """Write a line to a worker's standard input."""
        worker = self._latest().get(seat)
        if worker is not None:
            tell(worker.process, line)

    def start_worker(self) -> int:
        """Start one more worker: on the first placement that has none, else beside others. Returns its seat."""
        taken = {worker.placement.rank for worker in self._latest().values() if worker.process.poll() is None}
        free = [placement for placement in self._seating.placements if placement.rank not in taken]
        seat = max([len(self._seating.placements) - 1, *(worker.seat for worker in self._workers)]) + 1
        if free:
            placement = free[0]
            if placement.rank not in self._latest():
                seat = placement.rank
        else:
            placement = self._seating.placements[seat % len(self._seating.placements)]
        self._start(seat, placement)
        return seat

    def _start_coordinator(self, log: EventLog) -> None:
        """Start it, or start it again where it listened before."""
        known = self._coordinator
        known.folder.mkdir(mode=0o700, exist_ok=True)
        address_file = known.folder / "address.json"
        address_file.unlink(missing_ok=True)
        listen = known.address or f"{self._seating.coordinator_address}:0"
        config = {
            "rules": {
                "run": str(self.run.read_info()["id"]),
                "expected": self._membership.nodes,
                "min_nodes": self._membership.min_nodes,
                "max_nodes": self._membership.max_nodes,
                "lease_s": self._membership.lease_s,
            },
            "token": known.token,
            "listen": listen,
            "log": str(known.folder / f"views-{self.run.read_info()['id']}.jsonl"),
            "address_file": str(address_file),
        }
        path = known.folder / "config.json"
        path.touch(mode=0o600)
        write_atomic(path, json.dumps(config).encode())
        command = [*self._seating.coordinator_prefix, sys.executable, "-m", "shoal.cluster.coordinator", str(path)]
        env = {**os.environ, "SHOAL_CONTROL": "stdin"}
        known.process = open_process(command, env, self.run.logs / "coordinator.log")
        known.address = self._address(address_file, known.process)
        log.write("coordinator_started", address=known.address)

    def _start_servers(self) -> None:
        for index in range(self._membership.servers):
            placement = self._seating.placements[index % len(self._seating.placements)]
            env = {**os.environ, "SHOAL_NODE": placement.node, "SHOAL_CONTROL": "stdin", "PYTHONUNBUFFERED": "1"}
            command = [*placement.prefix, sys.executable, "-m", "shoal.engine.server", str(self.run.path), str(index)]
            log = self.run.logs / f"server-{index}.log"
            self._servers.append(open_process(command, {**env, **placement.env}, log))

    def _check_servers(self) -> None:
        """A server that was killed is its replica's and the workers' business; one that failed by itself is not."""
        for index, server in enumerate(self._servers):
            if server.poll() is not None and index not in self._ended_servers:
                self._ended_servers.add(index)
                self._whereabouts.mark_lost(index)
                if server.returncode == 1:
                    raise explain(self.run, {}, since=self._since)

    def _address(self, path: Path, process: subprocess.Popen[bytes]) -> str:
        deadline = time.monotonic() + _READY_S
        while time.monotonic() < deadline:
            if path.exists():
                return str(json.loads(path.read_bytes())["address"])
            if process.poll() is not None:
                said = (self.run.logs / "coordinator.log").read_text(errors="replace").strip().splitlines()
                raise CoordinatorError(f"the coordinator ended at its start: {said[-1] if said else 'it said nothing'}")
            time.sleep(0.005)
        raise CoordinatorError(f"the coordinator did not listen within {_READY_S:.0f} s; see {self.run.logs}")

    def _start(self, seat: int, placement: Placement) -> None:
        env: Mapping[str, str] = {
            **os.environ,
            "SHOAL_COORDINATOR": self._coordinator.address,
            "SHOAL_TOKEN": self._coordinator.token,
            "SHOAL_SEAT": str(seat),
            "SHOAL_NODE": placement.node,
            "SHOAL_NODE_WORKERS": str([other.node for other in self._seating.placements].count(placement.node)),
            "SHOAL_CONTROL": "stdin",
            "RANK": str(seat),
            "PYTHONUNBUFFERED": "1",
            **placement.env,
        }
        command = [*placement.prefix, sys.executable, "-m", "shoal.engine.worker", str(self.run.path)]
        command += ["--resume"] if self._resume else []
        process = open_process(command, env, self.run.logs / f"rank-{seat}.log")
        self._workers.append(_Worker(seat, placement, process))
        if self._interrupts:
            ask_to_stop(process)

    def _follow(self, reader: EventReader, log: EventLog, injector: Injector | None) -> None:
        watch_at, deadline = 0.0, float("inf")
        while True:
            now = time.monotonic()
            for worker in self._workers:
                if worker.process.poll() is not None and not worker.reported:
                    self._report(worker, log)
                    if worker.process.returncode == 0 and self._has_finished(worker):
                        deadline = min(deadline, now + self._membership.lease_s + _GRACE_S)
            if all(worker.reported for worker in self._workers):
                return
            if self._interrupts > 1:
                raise KeyboardInterrupt
            if self._coordinator.process is not None and self._coordinator.process.poll() is not None:
                collect(self._coordinator.process)
                self._start_coordinator(log)
            if now > deadline:
                self._kill_workers()
            self._check_servers()
            events = reader.poll() if injector is not None or now >= watch_at else []
            if injector is not None:
                injector.observe(events)
            if events or now >= watch_at:
                watch_at = now + _WATCH_S
                self._watch(events)
            time.sleep(_POLL_S)

    def _report(self, worker: _Worker, log: EventLog) -> None:
        """A worker's process has ended: note it, and start it again if the plan wants that."""
        worker.reported = True
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

    def _has_finished(self, worker: _Worker) -> bool:
        """Whether a worker that ended well came to the end of training, and did not only leave."""
        path = self.run.events / f"rank-{worker.seat}.jsonl"
        lines = path.read_bytes().splitlines()[-5:] if path.exists() else []
        return any(b'"kind":"run_finished"' in line for line in lines)

    def _latest(self) -> dict[int, _Worker]:
        return {worker.seat: worker for worker in self._workers}

    def _on_signal(self) -> None:
        self._interrupts += 1
        if self._interrupts == 1:
            self._notice("stopping after this step and saving a checkpoint; once more stops at once")
            for worker in self._workers:
                ask_to_stop(worker.process)

    def _kill_workers(self) -> None:
        for worker in self._workers:
            if worker.process.poll() is None:
                worker.killed = True
                kill_group(worker.process.pid)

    def _end_all(self) -> None:
        self._kill_workers()
        for worker in self._workers:
            collect(worker.process)
        for server in self._servers:
            collect(server)
        if self._coordinator.process is not None:
            collect(self._coordinator.process)
