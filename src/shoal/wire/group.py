"""Some ranks of a view that act together, and how this process waits for them.

Gloo tells all who wait that a connection has ended but one: whoever has got a part of a message waits on for the rest
of it, until the timeout (gloo/transport/tcp/pair.cc, `signalException` leaves out the receive and the send that have
begun). So nobody here waits without looking, now and then, whether the view has been cut. What is left waiting inside
Gloo is let alone, with its group: to destroy that would mean to wait for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _register_process_group

from shoal.errors import PeerLostError
from shoal.wire.waiting import LOOK_S, result_unless

_LOOK = timedelta(seconds=LOOK_S)
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

    def gather_into(self, gathered: Tensor, own: Tensor) -> None:
        """Collect every member's `own` in `gathered`, one after the other in their order."""
        self._finish(self._of(own)._allgather_base(gathered, own), own)

    def reduce_scatter(self, own: Tensor, whole: Tensor) -> None:
        """Sum every member's `whole`, of which member i gets the i-th part as `own`; `whole` may be overwritten.

        Gloo's own is an all-reduce inside, and one whose wait knows no end.
        """
        if whole.device.type == "cpu":
            self.all_reduce(whole)
            own.copy_(whole.view(self.size, *own.shape)[self.index])
        else:
            self._of(whole)._reduce_scatter_base(own, whole).wait()

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


def _is_over_in(work: Any, at_most: timedelta) -> bool:
    """Whether a collective comes to its end within a time, which does no harm to it. Raises what went wrong in it."""
    began = time.monotonic()
    try:
        work.wait(at_most)
    except RuntimeError:
        if work.is_completed():
            work.wait()
        elif time.monotonic() - began < at_most.total_seconds() / 2:
            raise  # not for want of time
        else:
            return False
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


def _damaged(tensor: Tensor) -> Tensor:
    copy = tensor.detach().clone().contiguous()
    content = copy.reshape(-1).view(torch.uint8)
    content[len(content) // 2] ^= 0x10
    return copy
