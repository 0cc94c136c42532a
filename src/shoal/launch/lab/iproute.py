"""The commands of iproute2: many lines to one `ip` or `tc` process, because a process for each would take longer.

Commands run in a session of their own, so that a Ctrl-C meant for the parent never stops one half way.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shoal.errors import LabError


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Lines for one process.

    Attributes:
        tool: `ip`, `tc` or `bridge`.
        lines: its commands, without the tool's name.
        namespace: the network namespace they run in; None is the caller's own.
    """

    tool: str
    lines: Sequence[str]
    namespace: str | None = None

    @property
    def command(self) -> list[str]:
        """The command line; the lines themselves go to its standard input."""
        inside = [] if self.namespace is None else ["-n", self.namespace]
        return [self.tool, *inside, "-batch", "-"]


def run_batches(batches: Iterable[Batch]) -> None:
    """Run all batches side by side and wait for them; each stops at its first bad line.

    Raises:
        LabError: a batch failed. The others have ended by then.
    """
    running: list[tuple[Batch, subprocess.Popen[str]]] = []
    try:
        for batch in batches:
            if batch.lines:
                running.append((batch, _start(batch.command)))
        failures = [f for batch, process in running if (f := _failure(batch, process))]
    finally:
        for _, process in running:
            _end(process)
    if failures:
        raise LabError(failures[0])


def run_all_lines(lines: Sequence[str]) -> None:
    """Run `ip` lines of which any may fail: for removing what may be gone already."""
    if lines:
        _start(["ip", "-force", "-batch", "-"]).communicate("\n".join(lines))


def _start(command: list[str]) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    except FileNotFoundError:
        raise LabError(f"the lab needs the command '{command[0]}': apt-get install iproute2") from None


def _end(process: subprocess.Popen[str]) -> None:
    """Leave nothing running after an interrupt: a late `ip` would make what the removal has just looked for."""
    if process.poll() is None:
        process.kill()
        process.communicate()


def _failure(batch: Batch, process: subprocess.Popen[str]) -> str | None:
    _, said = process.communicate("\n".join(batch.lines) + "\n")
    if process.returncode == 0:
        return None
    where = f" in namespace {batch.namespace}" if batch.namespace else ""
    return f"'{batch.tool}' failed{where}: {'; '.join(said.strip().splitlines())} (of: {'; '.join(batch.lines)})"
