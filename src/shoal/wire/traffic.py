"""What a rank sends: messages and bytes of payload, by receiver; and how many of each an operation takes.

`messages_of` is the arithmetic; `collectives.py` records with it what the library sends by itself, and counts the real
tensors of its own messages. `pricing.py` adds it up without a run.

The library's collectives are Gloo's (gloo/allreduce.cc, allgather.cc, broadcast.cc), in the direction and the sizes
that its sockets were seen to send: a sum goes round the ring towards lower ranks, an all-gather towards higher ones, a
broadcast down a binomial tree. A part that Gloo cuts into segments, which follow each other without waiting, counts as
one message. NCCL does not tell which algorithm it takes; the same is counted there. Headers are not payload, and what
carries no payload is no message.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from shoal.ops import AllGather, AllReduce, AllToAll, Broadcast, Op, SendRecv

Message = tuple[int, int]
"""(to rank, bytes of payload)"""

_SEGMENT_BYTES = 1 << 20  # Gloo's largest


@dataclass
class Traffic:
    """What one rank has sent.

    Attributes:
        sent: to rank -> (messages, bytes). One thread adds to it; others may read meanwhile.
    """

    sent: dict[int, tuple[int, int]] = field(default_factory=dict)

    @property
    def bytes_sent(self) -> int:
        """To all ranks together."""
        return sum(size_bytes for _, size_bytes in self.sent.copy().values())

    def record(self, messages: Iterable[Message]) -> None:
        """Add messages that have been sent; empty ones are none."""
        for to, size_bytes in messages:
            if size_bytes:
                self._add(to, 1, size_bytes)

    def merge(self, other: Traffic, times: int = 1) -> None:
        """Add what `other` has counted, so many times."""
        if times:
            for to, (messages, size_bytes) in other.sent.copy().items():
                self._add(to, times * messages, times * size_bytes)

    def to_plain(self) -> dict[str, list[int]]:
        """{to rank: [messages, bytes]}, for JSON."""
        return {str(to): list(count) for to, count in sorted(self.sent.copy().items())}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Sequence[int]]) -> Traffic:
        """Back from `to_plain`'s value."""
        return cls({int(to): (messages, size_bytes) for to, (messages, size_bytes) in plain.items()})

    def _add(self, to: int, messages: int, size_bytes: int) -> None:
        before = self.sent.get(to, (0, 0))
        self.sent[to] = (before[0] + messages, before[1] + size_bytes)


def total(parts: Iterable[Traffic]) -> Traffic:
    """The sum of what several parts of one rank have sent."""
    whole = Traffic()
    for part in parts:
        whole.merge(part)
    return whole


def messages_of(op: Op, index: int, members: Sequence[int]) -> list[Message]:
    """What one member of a group sends for one operation, in order.

    Args:
        op: its tensors may be on any device, `meta` too.
        index: the member's place in the group.
        members: the group's global ranks.
    """
    return [(members[to], size_bytes) for to, size_bytes in _sends(op, index, len(members)) if size_bytes]


def size_bytes(tensor: Tensor) -> int:
    """The bytes of a tensor's values."""
    return tensor.numel() * tensor.element_size()


def _sends(op: Op, index: int, size: int) -> Iterator[tuple[int, int]]:
    """(place in the group, bytes)."""
    after, before = (index + 1) % size, (index - 1) % size
    match op:
        case AllReduce(_, target) if size > 1:
            parts = _parts_bytes(size_bytes(target), target.element_size(), size)
            for round_ in range(size - 1):  # each part is summed on its way round
                yield before, parts[(index + 1 + round_) % size]
            for round_ in range(size - 1):  # then the sums go round
                yield before, parts[(index + round_) % size]
        case Broadcast(tensor, root):
            place = (index - root) % size
            for hop in _tree(place, size):
                yield (root + hop) % size, size_bytes(tensor)
        case AllToAll(tensor):
            for distance in range(1, size):
                to = (index + distance) % size
                yield to, size_bytes(tensor[to])
        case AllGather(tensor):
            for _ in range(size - 1):
                yield after, size_bytes(tensor)
        case SendRecv(tensor, to) if to is not None:
            yield to, size_bytes(tensor)
        case _:  # a barrier, a sum of one member, a receiver: nothing
            return


def _parts_bytes(total_bytes: int, item_bytes: int, size: int) -> list[int]:
    """How Gloo cuts a tensor among the members of its ring: whole segments of one size, the last ones cut short."""
    largest = _SEGMENT_BYTES // item_bytes * item_bytes
    wanted = max(_ceil(total_bytes, largest), 2 * size)
    per_part = _ceil(wanted, size)
    segment = _ceil(_ceil(total_bytes, per_part * size), item_bytes) * item_bytes
    part = per_part * segment
    return [min(max(total_bytes - place * part, 0), part) for place in range(size)]


def _tree(place: int, size: int) -> Iterator[int]:
    """Whom a member sends to in a binomial tree over places 0 (the root) to size - 1."""
    distance = 1
    while distance < size:
        if place < distance and place + distance < size:
            yield place + distance
        distance *= 2


def _ceil(value: int, divisor: int) -> int:
    return -(-value // divisor)
