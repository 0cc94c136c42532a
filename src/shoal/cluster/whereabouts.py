"""Where the parameter servers of a run listen, as files in its directory: workers come and go, and the files stay.

A file belongs to one attempt at the run; what an earlier one left is not looked at.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from shoal.errors import RendezvousError
from shoal.run import Run, write_atomic

_POLL_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Found:
    """All servers' addresses, in order, and the places of those whose process has ended."""

    addresses: tuple[str, ...]
    lost: frozenset[int]


class Whereabouts:
    """One attempt's files."""

    def __init__(self, run: Run) -> None:
        self._folder = run.path / "servers"
        self._attempt = str(run.read_info().get("id"))

    def publish(self, index: int, address: str) -> None:
        """Server `index` listens at `address`."""
        self._folder.mkdir(exist_ok=True)
        write_atomic(self._path(index, "address"), address.encode())

    def mark_lost(self, index: int) -> None:
        """The process of server `index` has ended."""
        self._folder.mkdir(exist_ok=True)
        self._path(index, "lost").touch()

    def find(self, num_servers: int, timeout_s: float) -> Found:
        """Wait until all have told where they listen.

        Raises:
            RendezvousError: one did not within `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        for index in range(num_servers):
            while not self._path(index, "address").exists():
                if time.monotonic() > deadline:
                    raise RendezvousError(
                        f"parameter server {index} did not say within {timeout_s:.0f} s where it listens (it writes "
                        f"a file to {self._folder}); see logs/server-{index}.log: did it start?"
                    )
                time.sleep(_POLL_S)
        addresses = tuple(self._path(index, "address").read_text() for index in range(num_servers))
        return Found(
            addresses=addresses,
            lost=frozenset(index for index in range(num_servers) if self._path(index, "lost").exists()),
        )

    def _path(self, index: int, what: str) -> Path:
        return self._folder / f"{self._attempt}-{index}.{what}"
