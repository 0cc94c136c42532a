"""Starts the workers of one run, watches them, and reports their end.

When one worker fails, the others have a few seconds to notice and are then killed.
"""

from __future__ import annotations

import os
import socket
import sys
import time

from shoal.errors import RendezvousError
from shoal.events import EventLog, EventReader
from shoal.launch.audience import Audience
from shoal.launch.failure import explain
from shoal.launch.placement import Placement, Seating
from shoal.launch.processes import open_process, signals
from shoal.launch.servers import FAILED, Servers
from shoal.launch.workers import Workers
from shoal.run import Run

_POLL_S = 0.1
_GRACE_S = 3.0


class Supervisor:
    """Runs all workers of a seating to their end."""

    def __init__(self, seating: Seating, run: Run, audience: Audience, *, resume: bool, num_servers: int = 0) -> None:
        """Prepare; `run` starts the processes.

        Args:
            num_servers: parameter servers to start beside the workers.
        """
        self._seating = seating
        self._run = run
        self._resume = resume
        self._num_servers = num_servers
        self._audience = audience
        self._workers = Workers()
        self._servers = Servers(run)
        self._failed: dict[int, int] = {}  # rank -> exit code, of those that ended badly by themselves, first to last
        self._interrupts = 0
        self._since = 0.0

    def run(self) -> None:
        """Start every worker and wait for all.

        Raises:
            WorkerFailedError: one failed; the message tells which, why, and where it happened.
            RendezvousError: the port to meet at is taken.
            KeyboardInterrupt: a second Ctrl-C; all workers have been killed.
        """
        self._since = time.time()
        reader = EventReader(self._run.events)
        reader.poll()  # a resumed run's past
        with signals(self._on_signal):
            try:
                with EventLog(self._run.events / "launcher.jsonl", "launcher") as log:
                    self._start()
                    self._follow(reader, log)
                    self._audience.watch(reader.poll())
                if self._failed:
                    raise explain(self._run, self._failed, since=self._since)
            finally:
                self._workers.close()
                self._servers.close()

    def _start(self) -> None:
        listener = _listen(self._seating) if self._seating.port == 0 or not self._seating.placements[0].prefix else None
        try:
            port = listener.getsockname()[1] if listener else self._seating.port
            for placement in self._seating.placements:
                self._start_worker(placement, port, listener)
            self._servers.start(self._seating, self._num_servers, self._meeting(port))
        finally:
            if listener is not None:
                listener.close()

    def _start_worker(self, placement: Placement, port: int, listener: socket.socket | None) -> None:
        handed = listener.fileno() if listener is not None and placement.rank == 0 else None
        env = {
            **os.environ,
            **self._meeting(port),
            "RANK": str(placement.rank),
            "LOCAL_RANK": str(placement.local_rank),
            "SHOAL_NODE": placement.node,
            "SHOAL_CONTROL": "stdin",
            "PYTHONUNBUFFERED": "1",
            **placement.env,
        }
        env |= {"SHOAL_LISTEN_FD": str(handed)} if handed is not None else {}
        command = [*placement.prefix, sys.executable, "-m", "shoal.engine.worker", str(self._run.path)]
        command += ["--resume"] if self._resume else []
        process = open_process(command, env, self._run.logs / f"rank-{placement.rank}.log", handed)
        self._workers.add(placement.rank, placement, process)

    def _meeting(self, port: int) -> dict[str, str]:
        """Where all meet, and how many."""
        return {
            "WORLD_SIZE": str(len(self._seating.placements)),
            "MASTER_ADDR": self._seating.address,
            "MASTER_PORT": str(port),
        }

    def _follow(self, reader: EventReader, log: EventLog) -> None:
        deadline: float | None = None
        while True:
            for worker in self._workers.ended():
                code = worker.process.returncode
                log.write("worker_exited", rank=worker.seat, pid=worker.process.pid, exit_code=code)
                if code != 0 and not worker.killed:
                    self._failed[worker.seat] = code
                    deadline = deadline or time.monotonic() + _GRACE_S
            if self._workers.all_ended:
                return
            if self._interrupts > 1:
                raise KeyboardInterrupt
            if FAILED in self._servers.ended().values():
                raise explain(self._run, {}, since=self._since)
            if deadline is not None and time.monotonic() > deadline:
                self._workers.kill()
            self._audience.watch(reader.poll())
            time.sleep(_POLL_S)

    def _on_signal(self) -> None:
        """A first time ask for a clean stop, a second time for an immediate one."""
        self._interrupts += 1
        if self._interrupts == 1:
            self._audience.notice("stopping after this step and saving a checkpoint; once more stops at once")
            self._workers.ask_to_stop()


def _listen(seating: Seating) -> socket.socket:
    """A listening socket for rank 0 to inherit: no one can take the port in between."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((seating.address, seating.port))
        listener.listen(max(128, len(seating.placements)))
    except OSError as error:
        listener.close()
        raise RendezvousError(
            f"cannot listen at {seating.address}:{seating.port}: {error.strerror}; name another --port, or leave it "
            "out to have a free one chosen"
        ) from None
    return listener
