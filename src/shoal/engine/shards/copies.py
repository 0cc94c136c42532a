"""Every so many steps each rank's shard is copied, in its own memory and in that of a rank on another node.

So whoever is lost, its shard of that step lives on with its keeper. Copying stops the step for as long as the memory
takes; sending runs beside training, over connections of its own. The copies before stay until all ranks have the new
ones: there is one complete set at any time after the first.
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass

import torch

from shoal.engine.memories import bytes_of
from shoal.engine.progress import Progress
from shoal.engine.shards.held import Holdings, Live
from shoal.engine.shards.shard import Shard
from shoal.engine.shards.streams import swap
from shoal.errors import PeerLostError
from shoal.wire.group import Group


@dataclass(frozen=True)
class Ring:
    """Who keeps whose copies. `group`: all ranks, for nothing else; `keepers`: by rank."""

    group: Group
    keepers: list[int]

    @property
    def keeper(self) -> int:
        """This rank's."""
        return self.keepers[self.group.index]

    @property
    def wards(self) -> list[int]:
        """The ranks whose copies this one keeps."""
        return [rank for rank, keeper in enumerate(self.keepers) if keeper == self.group.index]


class Copies:
    """One view's."""

    def __init__(self, ring: Ring, live: Live, holdings: Holdings, every: int) -> None:
        """`every`: steps between copies."""
        self._ring, self._live, self._holdings = ring, live, holdings
        self._every = every
        self._begun: int | None = None
        self._thread: threading.Thread | None = None
        self._new: tuple[Shard, ...] = ()
        self._error: BaseException | None = None

    def is_due(self, step: int) -> bool:
        """Whether copies should be made after this step: first as soon as the view has begun. Every rank alike."""
        return self._thread is None and (self._begun is None or step - self._begun >= self._every)

    def begin(self, progress: Progress) -> None:
        """Copy the live shard, which is the one after `progress`, and send it in the background."""
        own = self._live.shard(progress).copied()
        self._begun, self._new = progress.step, (own,)
        self._holdings.keep(own)
        self._thread = threading.Thread(target=self._exchange, args=(own,), daemon=True, name="shoal-copies")
        self._thread.start()

    @property
    def has_arrived(self) -> bool:
        """Whether this rank has all that it is to keep, and its keeper was sent its own.

        Raises:
            PeerLostError: it will never have it.
        """
        if self._error is not None:
            raise PeerLostError(f"copies of shards were not exchanged: {self._error}") from self._error
        return self._thread is not None and not self._thread.is_alive()

    def settle(self) -> None:
        """All ranks have theirs: the copies before go."""
        self._holdings.copies, self._thread = self._new, None

    def close(self) -> None:
        """The view has ended: nothing is kept any more that is on its way."""
        if self._thread is not None:
            self._thread.join()

    def _exchange(self, own: Shard) -> None:
        try:
            ring = self._ring
            arrived = send(ring.group, own, {ring.keeper}, ring.wards)
            self._new = (own, *arrived)
            self._holdings.keep(*arrived)
        except BaseException as error:
            self._error = error


def send(group: Group, own: Shard | None, to: set[int], sources: list[int]) -> list[Shard]:
    """Send a shard to some ranks, and take those of others.

    Raises:
        PeerLostError: a piece arrived damaged.
        RuntimeError, PeerLostError: a rank vanished.
    """
    text, tensors = b"", []
    if own is not None:
        document, by_name = own.encode()
        tensors = [bytes_of(tensor.cpu()) for tensor in by_name.values()]
        described = {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in by_name.items()}
        text = json.dumps({"document": document, "tensors": described}).encode()
    sizes = {source: torch.zeros(1, dtype=torch.int64) for source in sources}
    size = torch.tensor([len(text)]).view(torch.uint8)
    swap(group, {rank: [size] for rank in to}, {s: [n.view(torch.uint8)] for s, n in sizes.items()}, "a copy's size")
    texts = {source: torch.empty(int(size), dtype=torch.uint8) for source, size in sizes.items()}
    words = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)
    swap(group, {rank: [words] for rank in to}, {s: [t] for s, t in texts.items()}, "a copy's description")
    told = {source: json.loads(words.numpy().tobytes()) for source, words in texts.items()}
    rooms = {
        source: {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in t["tensors"].items()}
        for source, t in told.items()
    }
    incoming = {source: [bytes_of(tensor) for tensor in room.values()] for source, room in rooms.items()}
    swap(group, dict.fromkeys(to, tensors), incoming, "a copy of a shard")
    return [Shard.decode(told[source]["document"], rooms[source]) for source in sources]
