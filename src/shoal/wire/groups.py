"""The process groups of one view: made on demand by those who take part, and cut all at once.

They are torch.distributed's own backends (Gloo, NCCL), each with connections of its own, but not members of its global
state: a group of the next view can be made while those of this one still work, and whoever waits in a group that a
lost peer will never answer can be freed. Gloo has no such call (its `abort` leaves waiting operations waiting), so
`cut` shuts the sockets down that a group opened; to the operations it looks as if the peer had gone.

Gloo tells this to all who wait but one: whoever has got a part of a message waits on for the rest of it, until the
timeout (gloo/transport/tcp/pair.cc, `signalException` leaves out the receive and the send that have begun). So nobody
here waits without looking, now and then, whether the view has been cut. What is left waiting inside Gloo is let alone,
with its group: to destroy that would mean to wait for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import socket
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _register_process_group, _unregister_process_group

from shoal.errors import PeerLostError
from shoal.wire.waiting import LOOK_S, result_unless

SILENCE_TIMEOUT_S = 1800.0
"""A peer silent for longer than this counts as lost; one that dies is noticed at once, by its closed connection."""
_SILENCE = timedelta(seconds=SILENCE_TIMEOUT_S)
_LOOK = timedelta(seconds=LOOK_S)
_FREE_WITHIN_S = 1.0
"""Who is not free so long after a cut never will be."""
_DESCRIPTORS = Path("/proc/self/fd")
_NUMBERS = itertools.count()  # of process groups that torch.distributed knows by name


def _never() -> bool:
    return False


def _always() -> bool:
    return True


class Group:
    """Some ranks of a view. One thread at a time; ranks are places in `members`, whose values are global ranks.

    Attributes:
        is_over: whether the view was cut so long ago that all who wait should be free.
    """

    def __init__(
        self,
        backends: dict[str, Any],
        members: Sequence[int],
        rank: int,
        timeout: timedelta | None = None,
        *,
        on_lane: bool = False,
    ) -> None:
        """`backends`: by type of device. `timeout`: of one message; the other operations have the backends' own.

        `on_lane`: messages are waited for on a thread that may be given up, once the group `is_stuck`.
        """
        self.timeout = timeout
        self.on_lane = on_lane
        self.is_to_damage: Callable[[], bool] = _never
        self.is_over: Callable[[], bool] = _never
        self._waiting: list[None] = []  # one for each thread
        self._given_up = False
        self.members = list(members)
        self.index = self.members.index(rank)
        self._backends = backends

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return len(self.members)

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum over all members, in place."""
        self._finish(self._of(tensor).allreduce([tensor]), tensor)

    def broadcast(self, tensor: Tensor, root: int) -> None:
        """Copy member `root`'s tensor into everybody's."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = root, 0
        self._finish(self._of(tensor).broadcast([tensor], options), tensor)

    def all_gather(self, rows: list[Tensor], tensor: Tensor) -> None:
        """Collect every member's tensor into `rows`, in their order."""
        self._finish(self._of(tensor).allgather([rows], [tensor]), tensor)

    def all_to_all(self, received: Tensor, sent: Tensor) -> None:
        """Row i of `sent` goes to member i (NCCL)."""
        self._of(sent).alltoall_base(received, sent, [], []).wait()

    def send(self, tensor: Tensor, to: int) -> Any:
        """Begin to send to member `to`; returns what to `wait` for."""
        if tensor.numel() and self.is_to_damage():
            tensor = _damaged(tensor)
        return _Message(self, self._of(tensor).send([tensor], to, 0), tensor)

    def receive(self, tensor: Tensor, source: int) -> Any:
        """Begin to receive from member `source`; returns what to `wait` for."""
        return _Message(self, self._of(tensor).recv([tensor], source, 0), tensor)

    def barrier(self) -> None:
        """Wait until every member is here."""
        self._finish(next(iter(self._backends.values())).barrier())

    def as_process_group(self, store: dist.Store) -> dist.ProcessGroup:
        """This group as torch.distributed's functions take it, known to it by a name of its own; not a second one."""
        made = dist.ProcessGroup(store, self.index, self.size)
        kinds = {"cpu": dist.ProcessGroup.BackendType.GLOO, "cuda": dist.ProcessGroup.BackendType.NCCL}
        made._set_default_backend(kinds["cuda" if "cuda" in self._backends else "cpu"])
        for device, backend in self._backends.items():
            made._register_backend(torch.device(device), kinds[device], backend)
        made._set_group_name(dist.GroupName(f"shoal-{next(_NUMBERS)}"))
        _register_process_group(made.group_name, made)
        return made

    @property
    def is_stuck(self) -> bool:
        """Whether a thread of this process waits in vain for a message."""
        return bool(self._waiting) and self.is_over()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """While a thread waits inside the library."""
        self._waiting.append(None)
        try:
            yield
        finally:
            self._waiting.pop()

    def close(self) -> None:
        """Let the library close what nobody uses any more. The view has been cut."""
        while self._waiting and not self.is_over():
            time.sleep(0.005)
        if self._given_up or self._waiting:
            for backend in self._backends.values():
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(backend))  # never destroyed: that waits for its threads
        self._backends.clear()
        self.is_to_damage, self.is_over = _never, _always  # else the view's memory would wait for the garbage collector

    def _finish(self, work: Any, tensor: Tensor | None = None) -> None:
        """Wait for a collective. On a GPU the library's own wait does not block."""
        if tensor is not None and tensor.device.type != "cpu":
            work.wait()
            return
        with self.waiting():
            while not _is_over_in(work, _LOOK):
                if self.is_over():
                    self._given_up = True
                    raise PeerLostError(f"an operation over ranks {self.members} did not end with its view")

    def _of(self, tensor: Tensor) -> Any:
        return self._backends[tensor.device.type]


def _is_over_in(work: Any, time: timedelta) -> bool:
    """Whether a collective comes to its end within a time, which does no harm to it. Raises what went wrong in it."""
    try:
        work.wait(time)
    except RuntimeError:
        if not work.is_completed():
            return False
        work.wait()
    return True


@dataclass(frozen=True)
class _Message:
    """One on its way. To wait for it with a timeout that runs out would break the group."""

    group: Group
    work: Any
    tensor: Tensor

    def wait(self) -> None:
        if self.group.on_lane or self.tensor.device.type != "cpu":
            self._wait()
            return
        waited: Future[None] = Future()
        threading.Thread(target=self._wait_for, args=(waited,), daemon=True, name="shoal-message").start()
        result_unless(waited, lambda: self.group.is_stuck)

    def _wait_for(self, waited: Future[None]) -> None:
        try:
            self._wait()
            waited.set_result(None)
        except BaseException as error:
            waited.set_exception(error)

    def _wait(self) -> None:
        """Gloo gives messages the timeout of connecting, unless it is told another."""
        with self.group.waiting():
            if self.group.timeout is None:
                self.work.wait()
            else:
                self.work.wait(self.group.timeout)


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

    def process_group(self, name: str, members: Sequence[int]) -> dist.ProcessGroup:
        """As `group`, in the form that torch.distributed's layouts take. It ends with the view, like all groups.

        No default group is needed, so there is nothing global that one view would have to clear away for the next.
        """
        made = self.group(name, members).as_process_group(self.store)
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


def _damaged(tensor: Tensor) -> Tensor:
    copy = tensor.detach().clone().contiguous()
    content = copy.reshape(-1).view(torch.uint8)
    content[len(content) // 2] ^= 0x10
    return copy


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
    """For code that is not ours and talks to other ranks by itself, as a sharded model does in forward and backward.

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
