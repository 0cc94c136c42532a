"""The workers that a launcher has started, and what any supervisor does with all of them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

from shoal.launch.placement import Placement
from shoal.launch.processes import ask_to_stop, collect, kill_group


@dataclass
class Worker:
    """One process. `killed`: by the launcher; `reported`: its end was."""

    seat: int
    placement: Placement
    process: subprocess.Popen[bytes]
    killed: bool = False
    reported: bool = False

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None


class Workers:
    """All there have been; of one seat, the last one counts."""

    def __init__(self) -> None:
        self._all: list[Worker] = []

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._all)

    def add(self, seat: int, placement: Placement, process: subprocess.Popen[bytes]) -> None:
        """One was started."""
        self._all.append(Worker(seat, placement, process))

    def latest(self) -> dict[int, Worker]:
        """By seat."""
        return {worker.seat: worker for worker in self._all}

    def running(self, seat: int) -> Worker | None:
        """The seat's worker, if it runs."""
        worker = self.latest().get(seat)
        return worker if worker is not None and worker.runs else None

    def ended(self) -> list[Worker]:
        """Those that have ended since the last call."""
        news = [worker for worker in self._all if not worker.runs and not worker.reported]
        for worker in news:
            worker.reported = True
        return news

    @property
    def all_ended(self) -> bool:
        """Whether `ended` has told of all."""
        return all(worker.reported for worker in self._all)

    def ask_to_stop(self) -> None:
        """After the step at hand."""
        for worker in self._all:
            ask_to_stop(worker.process)

    def kill(self) -> None:
        """Kill those that run, with the processes they started."""
        for worker in self._all:
            if worker.runs:
                worker.killed = True
                kill_group(worker.process.pid)

    def close(self) -> None:
        """Kill what still runs, and collect it."""
        self.kill()
        for worker in self._all:
            collect(worker.process)
