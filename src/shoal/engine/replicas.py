"""Replicas start equal and stay equal: the initial parameters, and buffers that each rank changes by itself.

Runs on the main thread, while the communication threads are idle.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from shoal.errors import JobError
from shoal.wire.group import Group
from shoal.wire.groups import failures_as_lost_peers


def make_equal(model: nn.Module, group: Group, *, salt: str = "") -> bool:
    """Give every rank rank 0's parameters and buffers, if they are not equal already; return whether they were.

    Models built from one seed usually are equal, and then only a checksum is sent. What has no values yet is passed
    over; `salt` says how it will get them.

    Raises:
        JobError: the salts differ.
    """
    digest = hashlib.sha256()
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if not tensor.is_meta]
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    own = torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
    first = own.clone()
    with failures_as_lost_peers("comparing models"):
        group.broadcast(first, 0)
        differs = torch.tensor([float(not torch.equal(own, first))])
        group.all_reduce(differs)
        _check_salt(salt, group)
        if differs.item() > 0:
            for tensor in tensors:
                group.broadcast(tensor.detach(), 0)
    return differs.item() == 0


def _check_salt(salt: str, group: Group) -> None:
    if not salt:
        return
    own = torch.frombuffer(bytearray(salt.encode()), dtype=torch.uint8)
    first = own.clone()
    group.broadcast(first, 0)
    differs = torch.tensor([float(not torch.equal(own, first))])
    group.all_reduce(differs)
    if differs.item() > 0:
        raise JobError(
            "the ranks' models differ in large parameters: the job's model function draws other numbers, or builds "
            "another model, on some ranks; make it depend on its arguments and torch's seed only"
        )


class BufferAverage:
    """Averages buffers that training changes (batch norm's running statistics) when they are about to be looked at."""

    def __init__(self, model: nn.Module, weight: float, all_reduce: Callable[[Tensor], None]) -> None:
        """`weight`: this rank's part of every batch; over the ranks that `all_reduce` sums, the weights sum to 1."""
        self._all_reduce = all_reduce
        self.weight = weight
        self._buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self._versions = [buffer._version for buffer in self._buffers]

    def __call__(self) -> None:
        """Give every rank the mean, weighted by samples, of each buffer that changed on any rank. Collective."""
        if not self._buffers:
            return
        pairs = zip(self._buffers, self._versions, strict=True)
        changed = torch.tensor([float(buffer._version != version) for buffer, version in pairs])
        with failures_as_lost_peers("averaging buffers"):
            self._all_reduce(changed)
            for buffer, count in zip(self._buffers, changed.tolist(), strict=True):
                if count > 0:
                    self._all_reduce(buffer.mul_(self.weight))
        self._versions = [buffer._version for buffer in self._buffers]


class UndoneBuffers:
    """Puts back what a step that did not commit has changed in a model's buffers."""

    def __init__(self, model: nn.Module) -> None:
        self._volatile = list(model.buffers())  # all, until a step has shown which it changes
        self._versions = [buffer._version for buffer in self._volatile]
        self._before: list[Tensor] = []

    def begin(self) -> None:
        """A step begins."""
        self._before = [buffer.clone() for buffer in self._volatile]
        self._versions = [buffer._version for buffer in self._volatile]

    def commit(self) -> None:
        """The step counts. What it left alone (a mask, say) is taken for constant."""
        pairs = zip(self._volatile, self._versions, strict=True)
        self._volatile = [buffer for buffer, version in pairs if buffer._version != version]
        self._before = []

    def undo(self) -> None:
        """The step never happened."""
        for buffer, before in zip(self._volatile, self._before, strict=False):
            buffer.copy_(before)
        self._before = []
