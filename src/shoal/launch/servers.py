"""The parameter servers that a launcher has started: one after the other on the nodes, beside the workers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

from shoal.launch.placement import Seating
from shoal.launch.processes import collect, open_process
from shoal.run import Run

FAILED = 1
"""The exit code of one that failed by itself; what befell any other is the workers' business, which know replicas."""


class Servers:
    """All of a run."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._all: list[subprocess.Popen[bytes]] = []
        self._reported: set[int] = set()

    def start(self, seating: Seating, count: int, env: Mapping[str, str]) -> None:
        """Start so many. `env`: added to this process's own environment."""
        for index in range(count):
            placement = seating.placements[index % len(seating.placements)]
            own = {"SHOAL_NODE": placement.node, "SHOAL_CONTROL": "stdin", "PYTHONUNBUFFERED": "1", **placement.env}
            command = [*placement.prefix, sys.executable, "-m", "shoal.engine.server", str(self._run.path), str(index)]
            log = self._run.logs / f"server-{index}.log"
            self._all.append(open_process(command, {**os.environ, **env, **own}, log))

    def ended(self) -> dict[int, int]:
        """Exit codes, by index, of those that have ended since the last call."""
        codes = {i: code for i, server in enumerate(self._all) if (code := server.poll()) is not None}
        news = {index: code for index, code in codes.items() if index not in self._reported}
        self._reported |= set(news)
        return news

    def close(self) -> None:
        """Kill what still runs, and collect it."""
        for server in self._all:
            collect(server)
