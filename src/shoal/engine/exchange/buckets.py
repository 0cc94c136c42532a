"""Gradients in buckets: filled by hooks while backward runs, sent in a fixed order as soon as they are full.

Each parameter has a slot in flat memory. Its hook moves the fresh gradient into the slot and makes `p.grad` a view of
it, so that further micro-batches add in place and nothing is copied again; after the exchange `p.grad` is a view of the
reduced values. Moving costs one read and one write, less than clearing the slot and letting autograd add to it.

Buckets follow the parameters' order backwards, since the last layers' gradients come first. They are never rebuilt.
A parameter without a gradient on this rank counts as zeros; one without a gradient on any rank keeps `grad = None`,
as it would on a single process, so that the optimizer passes it over.

A rank that cannot go on (it ran out of memory) sends what has not left yet all the same, marked as spoiled: nobody
hangs, and everybody knows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shoal.engine.exchange import flat
from shoal.engine.layout.replica import Held, Replica
from shoal.errors import JobError
from shoal.strategy.bucket import Bucket
from shoal.strategy.flat import Flat, gradient_buckets
from shoal.wire.transport import Memory

Allocate = Callable[[int, int, torch.dtype], Memory]
"""(bucket's number, values, dtype) -> flat memory."""


@dataclass
class _Slot:
    """One parameter's place.

    `dressed`: `source` as autograd has to see it; `filled`: its gradient of this step lies there; `counted`: it has
    come in the last backward, so it is complete.
    """

    held: Held
    bucket: int
    source: Tensor
    target: Tensor
    offset: int
    dressed: Tensor
    filled: bool = False
    counted: bool = False


class GradientBuckets:
    """All gradients of one model on one rank."""

    def __init__(
        self,
        replica: Replica,
        bucket_bytes: int,
        allocate: Allocate,
        send: Callable[[int, Bucket], None],
    ) -> None:
        """Lay out the buckets and hook the parameters.

        Args:
            replica: its trainable parameters are meant.
            bucket_bytes: a bucket is closed when it holds as much.
            allocate: makes flat memory; called in the same order on every rank.
            send: called with each bucket and its number once a step, in order, when all its gradients are there.
        """
        self._send = send
        self._replica = replica
        by_name = {held.name: held for held in replica.held}
        self.buckets: list[Bucket] = []
        self._slots: list[_Slot] = []
        for laid in gradient_buckets(replica.named_locals, bucket_bytes):
            self._lay_out(laid, by_name, allocate)
        self._slots_of = [[s for s in self._slots if s.bucket == index] for index in range(len(self.buckets))]
        self._missing = [0] * len(self.buckets)
        self._next = 0
        self._sending = self._spoiled = False
        self._hooks = [slot.held.owner.register_post_accumulate_grad_hook(self._hook(slot)) for slot in self._slots]

    def begin(self) -> None:
        """A new step: no gradient is there yet."""
        self._replica.clear_gradients()
        self._spoiled = False
        for slot in self._slots:
            slot.filled = False

    def begin_last_backward(self) -> None:
        """From now on a bucket is sent as soon as it is full."""
        for slot in self._slots:
            slot.counted = False
        self._missing = [len(slots) for slots in self._slots_of]
        self._next = 0
        self._sending = True

    def end_last_backward(self) -> None:
        """Send what backward did not fill; take gradients that came without a hook, as from zero-bubble schedules."""
        self._sending = False
        for slot in (slot for slots in self._slots_of[self._next :] for slot in slots):
            if slot.held.owner.grad is not None:
                self._take(slot)
        while self._next < len(self.buckets):
            self._send_next()

    def spoil(self) -> None:
        """This rank's gradient will not be complete: mark the buckets that have not left yet.

        If all have left, then it was complete, and nothing is marked.
        """
        self._spoiled = True

    @property
    def is_spoiled(self) -> bool:
        """Whether some rank's gradient was not complete, after the exchange."""
        last = self.buckets[-1].target  # whoever could not go on had not sent the last one, at least
        return bool(last[-1] > 0)

    def install(self) -> int:
        """Point every parameter's gradient at the reduced values, or to None where no rank had one.

        Returns:
            How many parameters have a gradient.
        """
        used = torch.cat([bucket.target[bucket.num_values : -1] for bucket in self.buckets]).tolist()
        flags = {slot.held.name: count > 0 for slot, count in zip(self._slots, used, strict=True)}
        anywhere = self._replica.used_anywhere([flags[held.name] for held in self._replica.held])
        flags = {held.name: flag for held, flag in zip(self._replica.held, anywhere, strict=True)}
        for slot in self._slots:
            slot.held.owner.grad = None
            slot.held.local.grad = slot.target if flags[slot.held.name] else None
        return sum(flags.values())

    def copy(self) -> list[Tensor]:
        """Everything that was reduced in this step, for `install_copy`."""
        return [bucket.target.clone() for bucket in self.buckets]

    def install_copy(self, memories: Sequence[Tensor]) -> None:
        """As `install`, with what `copy` gave after another step. For whole replicas."""
        used = torch.cat([m[bucket.num_values : -1] for m, bucket in zip(memories, self.buckets, strict=True)]).tolist()
        for (parameter, view), count in zip(self.views(memories), used, strict=True):
            parameter.grad = view if count > 0 else None

    def views(self, memories: Sequence[Tensor]) -> list[tuple[nn.Parameter, Tensor]]:
        """Each parameter with its place in other memory that is laid out like the buckets' values."""
        return [(s.held.local, flat.view_like(s.held.local, memories[s.bucket], s.offset)) for s in self._slots]

    def reduced(self) -> list[tuple[Held, Tensor]]:
        """Each parameter with its sum over the replicas, after the exchange."""
        return [(slot.held, slot.target) for slot in self._slots]

    def close(self) -> None:
        """Take the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()

    def _lay_out(self, laid: Flat[nn.Parameter], held: Mapping[str, Held], allocate: Allocate) -> None:
        index = len(self.buckets)
        bucket = laid.bucket(functools.partial(allocate, index), flags=True)
        self.buckets.append(bucket)
        for (name, p), piece in zip(laid.named, laid.pieces, strict=True):
            source, target = (flat.view_like(p, whole, piece.offset) for whole in (bucket.source, bucket.target))
            self._slots.append(_Slot(held[name], index, source, target, piece.offset, held[name].like_owner(source)))

    def _hook(self, slot: _Slot) -> Callable[[Tensor], None]:
        def on_gradient(_: Tensor) -> None:
            self._take(slot)
            if self._sending:
                _check_once(slot)
                slot.counted = True
                self._missing[slot.bucket] -= 1
                self._send_full()

        return on_gradient

    def _take(self, slot: _Slot) -> None:
        gradient = slot.held.owner.grad
        assert gradient is not None
        if gradient is not slot.dressed:
            _check_dense(slot.held.name, gradient)
            slot.source.copy_(slot.held.local_of(gradient))
            slot.held.owner.grad = slot.dressed
        slot.filled = True

    def _send_full(self) -> None:
        while self._next < len(self.buckets) and self._missing[self._next] == 0:
            self._send_next()

    def _send_next(self) -> None:
        bucket = self.buckets[self._next]
        slots = self._slots_of[self._next]
        for slot in slots:
            if not slot.filled:
                slot.source.zero_()
        used = [slot.filled and self._replica.used(slot.held.name) for slot in slots]
        flags = torch.tensor([*used, self._spoiled], dtype=bucket.source.dtype)
        bucket.source[bucket.num_values :].copy_(flags, non_blocking=True)
        self._send(self._next, bucket)
        self._next += 1


def _check_dense(name: str, gradient: Tensor) -> None:
    if gradient.layout != torch.strided:
        raise JobError(
            f"the gradient of {name} is sparse ({gradient.layout}); expected a dense one: build the embedding with "
            "sparse=False"
        )


def _check_once(slot: _Slot) -> None:
    """A bucket may be on its way when the second gradient comes: refuse rather than exchange half of one."""
    if slot.counted:
        raise JobError(
            f"the gradient of {slot.held.name} came twice in one backward, as reentrant activation checkpointing makes "
            "it; use torch.utils.checkpoint with use_reentrant=False"
        )
