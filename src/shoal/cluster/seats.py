"""Which seats and names of nodes one attempt at a run has given out, as files in its directory: each is given once.

A worker's seat names its event log and seeds its random numbers; ranks of one node's name share memory. So two workers
that start at the same moment on two machines may have neither in common. Whoever creates a file, which the file system
lets only one do, has it. A seat stays taken when its worker is gone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

from shoal.run import Run


class Seats:
    """One attempt's files, as one launcher sees them.

    Attributes:
        own: the seats that were taken through this object.
    """

    def __init__(self, run: Run) -> None:
        self._folder = run.coordinator / f"seats-{run.read_info().get('id')}"
        self.own: set[int] = set()

    def take(self) -> int:
        """The lowest seat that nobody has had."""
        seat = int(self._claim("seat", (str(seat) for seat in itertools.count())))
        self.own.add(seat)
        return seat

    def take_node(self, host: str) -> str:
        """A name for a node: `host`, or `host-2` and so on where another node has that."""
        return self._claim("node", (host if number == 1 else f"{host}-{number}" for number in itertools.count(1)))

    def free_node(self, node: str) -> None:
        """The node has no workers any more: its name may be given again."""
        (self._folder / f"node-{node}").unlink(missing_ok=True)

    def others(self) -> set[int]:
        """The seats that were given to others."""
        given = {int(path.name.removeprefix("seat-")) for path in self._folder.glob("seat-*")}
        return given - self.own

    def _claim(self, what: str, names: Iterable[str]) -> str:
        for folder in (self._folder.parent, self._folder):
            folder.mkdir(mode=0o700, exist_ok=True)
        return next(name for name in names if _create(self._folder / f"{what}-{name}"))


def _create(path: Path) -> bool:
    """Whether the file is ours: it did not exist before."""
    try:
        path.touch(mode=0o600, exist_ok=False)
    except FileExistsError:
        return False
    return True
