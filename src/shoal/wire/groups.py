"""The process groups of one view: made on demand by those who take part, and cut all at once.

They are torch.distributed's own backends (Gloo, NCCL), each with connections of its own, but not members of its global
state: a group of the next view can be made while those of this one still work, and whoever waits in a group that a
lost peer will never answer can be freed. Gloo has no such call (its `abort` leaves waiting operations waiting), so
`cut` shuts the sockets down that a group opened; to the operations it looks as if the peer had gone.
How one waits in a group: `group.py`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _unregister_process_group

from shoal.errors import PeerLostError
from shoal.wire.group import Group

SILENCE_TIMEOUT_S = 1800.0
"""A peer silent for longer than this counts as lost; one that dies is noticed at once, by its closed connection."""
_SILENCE = timedelta(seconds=SILENCE_TIMEOUT_S)
_FREE_WITHIN_S = 1.0
"""Who is not free so long after a cut never will be."""
_DESCRIPTORS = Path("/proc/self/fd")


class World:
    """All ranks of one view, connected.

    Attributes:
        rank: this process's.
        size: the number of ranks.
        store: shared by all ranks of the view, and by no other view.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        device: torch.device,
        *,
        connect_timeout_s: float = SILENCE_TIMEOUT_S,
        exempt_ports: Sequence[int] = (),
    ) -> None:
        """Nothing is connected before `connect`.

        Args:
            connect_timeout_s: how long to wait for a peer that does not connect.
            exempt_ports: connections from or to these are others' and survive a cut.
        """
        self.rank = rank
        self.size = size
        self.store = store
        self._device = device
        self._connect_timeout = timedelta(seconds=connect_timeout_s)
        self._exempt = frozenset(exempt_ports)
        self._lock = threading.Lock()
        self._sockets: dict[int, int] = {}
        self._on_cut: list[Callable[[], None]] = []
        self._on_close: list[Callable[[], None]] = []
        self._groups: list[Group] = []
        self._damages: list[None] = []
        self._made: Counter[str] = Counter()
        self._cut_at: float | None = None
        self._everybody: Group | None = None

    def connect(self) -> None:
        """Connect to all other ranks. Collective.

        Raises:
            PeerLostError: a rank could not be reached.
        """
        self._everybody = self.group("everybody", range(self.size))

    @property
    def everybody(self) -> Group:
        """The group of all ranks, for the main thread."""
        assert self._everybody is not None, "connect first"
        return self._everybody

    @property
    def is_cut(self) -> bool:
        """Whether `cut` has been called."""
        return self._cut_at is not None

    def group(self, name: str, members: Sequence[int], *, on_lane: bool = False) -> Group:
        """Connect the ranks `members`, of which this is one. Collective over them, who all call it by the same `name`.

        `on_lane`: see `Group`.

        Raises:
            PeerLostError: a rank could not be reached, or the view was cut.
        """
        key = f"group/{name}/{'-'.join(map(str, members))}"
        self._made[key] += 1
        store = dist.PrefixStore(f"{key}/{self._made[key]}", self.store)
        index = list(members).index(self.rank)
        with self._lock, failures_as_lost_peers(f"connecting ranks {list(members)}"):
            before = _open_sockets()
            gloo = dist.ProcessGroupGloo(dist.PrefixStore("cpu", store), index, len(members), self._connect_timeout)
            gloo._set_default_timeout(_SILENCE)
            backends: dict[str, Any] = {"cpu": gloo}
            if self._device.type == "cuda":
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = _SILENCE
                nccl = dist.ProcessGroupNCCL(dist.PrefixStore("cuda", store), index, len(members), options)
                backends["cuda"] = nccl
            own = {fd: inode for fd, inode in _open_sockets().items() if before.get(fd) != inode}
        group = Group(backends, members, self.rank, _SILENCE, on_lane=on_lane)
        if self.is_cut:
            # Whose the new sockets are is not certain: the next view may be connecting already. Letting go of the
            # group closes its own, and nobody here waits for an operation of it.
            group.close()
            raise PeerLostError(f"connecting ranks {list(members)} failed: the view was cut meanwhile")
        self._sockets |= own
        group.is_to_damage, group.is_over = self._take_damage, self._is_over
        self._groups.append(group)
        return group

    def process_group(self, group: Group) -> dist.ProcessGroup:
        """One of this view's groups in the form that torch.distributed's layouts take. It ends with the view.

        No default group is needed, so there is nothing global that one view would have to clear away for the next.
        """
        made = group.as_process_group(self.store)
        self.on_close(lambda: _unregister_process_group(made.group_name))
        return made

    def sum(self, values: Sequence[float]) -> list[float]:
        """Add float64 values up over all ranks, on the main thread. Collective.

        Raises:
            PeerLostError: a rank vanished.
        """
        total = torch.tensor(values, dtype=torch.float64)
        with failures_as_lost_peers("summing over all ranks"):
            self.everybody.all_reduce(total)
        summed: list[float] = total.tolist()
        return summed

    def tell(self, text: bytes | None, teller: int) -> bytes:
        """Give all ranks the text of rank `teller`, on the main thread; None on the others. Collective."""
        size = torch.tensor([len(text) if text is not None else 0])
        self.everybody.broadcast(size, teller)
        content = torch.empty(int(size), dtype=torch.uint8)
        if text is not None:
            content = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.everybody.broadcast(content, teller)
        return content.numpy().tobytes()

    def damage_next(self) -> None:
        """Change a byte of the next message that this rank sends, as a bad cable would: for rehearsals."""
        self._damages.append(None)

    def _take_damage(self) -> bool:
        if not self._damages:
            return False
        self._damages.pop()
        return True

    def on_cut(self, action: Callable[[], None]) -> None:
        """Call `action` when the view is cut, from whatever thread that is; now, if it has been."""
        self._on_cut.append(action)
        if self.is_cut:
            action()

    def cut(self) -> None:
        """End every operation of this view at once, here and as others see it; from any thread, any number of times."""
        self._cut_at = self._cut_at or time.monotonic()
        for action in list(self._on_cut):
            action()
        self._shut_down()

    def on_close(self, action: Callable[[], None]) -> None:
        """Call `action` in `close`."""
        self._on_close.append(action)

    def close(self) -> None:
        """Cut, and give sockets and memory back. Nothing of this view may be in use any more."""
        self.cut()
        for action in self._on_close:
            action()
        self._on_close.clear()
        for group in self._groups:
            group.close()
        self._groups.clear()
        self._sockets.clear()

    def _is_over(self) -> bool:
        return self._cut_at is not None and time.monotonic() > self._cut_at + _FREE_WITHIN_S

    def _shut_down(self) -> None:
        for descriptor, inode in list(self._sockets.items()):
            with contextlib.suppress(OSError):
                if os.fstat(descriptor).st_ino == inode:
                    _shut_down(descriptor, self._exempt)


def _open_sockets() -> dict[int, int]:
    """This process's sockets: descriptor -> inode, which no later socket of the same descriptor has."""
    found = {}
    names = os.listdir(_DESCRIPTORS) if _DESCRIPTORS.exists() else []
    for name in names:
        with contextlib.suppress(OSError):
            status = os.fstat(int(name))
            if stat.S_ISSOCK(status.st_mode):
                found[int(name)] = status.st_ino
    return found


def _shut_down(descriptor: int, exempt: frozenset[int]) -> None:
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        if connection.family not in (socket.AF_INET, socket.AF_INET6):
            return
        if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return  # Gloo's listener takes its end for a fault of its own, and ends the process
        ports = {connection.getsockname()[1], connection.getpeername()[1]}
        if not ports & exempt:
            connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def failures_as_lost_peers(what: str) -> Iterator[None]:
    """torch.distributed reports a vanished peer as a RuntimeError: name it for what it is.

    Raises:
        PeerLostError: `what` failed.
    """
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise PeerLostError(f"{what} failed, most likely because another rank ended: {reason}") from error


@contextmanager
def lost_peers_named() -> Iterator[None]:
    """For code that is not ours and talks to other ranks, as a sharded model does in forward and backward.

    Raises:
        PeerLostError: an operation between ranks failed; whatever else is wrong is raised as it is.
    """
    try:
        yield
    except PeerLostError:
        raise
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        reason = str(error).partition("\n")[0]
        raise PeerLostError(f"an operation between ranks failed, most likely because one ended: {reason}") from error
