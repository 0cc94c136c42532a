"""When a view begins, every rank gets the state of those who have come furthest.

After a failure some ranks may have committed a step that others have not; a newcomer has nothing yet; and ranks whose
parameters differ although they should not must hear of it. So all compare how far they are and what they hold. Who is
behind takes everything from several peers at once, each of which sends another part. Each piece carries a checksum
(CRC-32): what arrives damaged ends the view, and is asked for again in the next.

Where every rank has a replica of its own (gossip, local steps), whoever trained in the newest view keeps it, and is not
corrected; only those who come in take another's. What becomes of steps that a rank lacks is `course.py`'s.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shoal.engine.build import Parts
from shoal.engine.checkpoint import tree
from shoal.engine.layout.optimizer_state import named_state
from shoal.engine.memories import bytes_of, copy_range, pieces_of
from shoal.engine.progress import Progress
from shoal.engine.restoring import restore
from shoal.errors import PeerLostError
from shoal.wire.checksum import NUM_BYTES, check, checksum
from shoal.wire.group import Group
from shoal.wire.groups import World, failures_as_lost_peers

_MOST_STEPS = 8
"""While a state travels its taker keeps each step's gradients, and later takes all those steps at once."""
_NOTHING = -1


@dataclass(frozen=True)
class Standing:
    """How far a rank is: committed steps (-1: it has no state), the last step validated, what its parameters are, the
    view that it trained in last, and whether it is in the middle of a round (1) that began at that step.
    """

    step: int
    validated: int
    digest: int
    epoch: int = 0
    midway: int = 0


@dataclass(frozen=True)
class Roles:
    """Who gives and who takes. `teller`: one giver, which also knows of the latest validation; None: nobody has any
    state. `differing`: ranks that should hold what the givers hold, and do not.
    """

    teller: int | None
    givers: list[int]
    takers: list[int]
    differing: list[int]


def roles(standings: Sequence[Standing]) -> Roles:
    """Decide who hands over to whom: the most frequent parameters among those who have come furthest go to the rest."""
    furthest = max(standing.step for standing in standings)
    if furthest == _NOTHING:
        return Roles(None, [], [], [])
    # Who took that step in an older view took it with other sums: only the newest view's counts.
    newest = max(standing.epoch for standing in standings if standing.step == furthest)
    ahead = [r for r, standing in enumerate(standings) if (standing.step, standing.epoch) == (furthest, newest)]
    counts = Counter(standings[rank].digest for rank in ahead)
    most = max(counts.values())
    digest = next(standings[rank].digest for rank in ahead if counts[standings[rank].digest] == most)
    givers = [rank for rank in ahead if standings[rank].digest == digest]
    teller = max(givers, key=lambda rank: (standings[rank].validated, -rank))
    takers = [rank for rank in range(len(standings)) if rank not in givers]
    return Roles(teller, givers, takers, [rank for rank in ahead if rank not in givers])


def roles_apart(standings: Sequence[Standing]) -> Roles:
    """The same for replicas that differ by design: one of those who have come furthest in the newest view gives."""
    epochs = [standing.epoch for standing in standings if standing.step != _NOTHING]
    if not epochs:
        return Roles(None, [], [], [])
    keeping = [
        rank for rank, standing in enumerate(standings) if standing.step != _NOTHING and standing.epoch == max(epochs)
    ]
    teller = max(
        keeping, key=lambda rank: (standings[rank].step, standings[rank].midway, standings[rank].validated, -rank)
    )
    return Roles(teller, [teller], [rank for rank in range(len(standings)) if rank not in keeping], [])


@dataclass(frozen=True)
class Outcome:
    """What came of comparing.

    Attributes:
        progress: how far all are now; None: nobody has any state.
        giving: this rank's part of the state, to be sent to others in the background, once it has begun.
        taking: what this rank is sent in the background; until it is there, the rank has no state of its own.
        standings: of all ranks, before.
    """

    progress: Progress | None
    roles: Roles
    standings: Sequence[Standing]
    giving: Giving | None = None
    taking: Taking | None = None

    def begin(self) -> None:
        """Let the state travel. Only now: what training waits for comes first."""
        for travelling in (self.giving, self.taking):
            if travelling is not None:
                travelling.begin()


def hand_over(
    world: World,
    parts: Parts,
    progress: Progress | None,
    aside: Group | None,
    *,
    epoch: int = 0,
    apart: bool = False,
    midway: bool = False,
) -> Outcome:
    """Give all ranks of a view a state to go on from. Collective.

    Args:
        progress: how far this rank is; None if it has no state.
        aside: a group of all ranks that nobody else uses; over it the state travels in the background. None: all wait
            until it has arrived.
        epoch: of the view that this rank trained in last.
        apart: every rank has a replica of its own; otherwise all are to be equal.
        midway: this rank is in the middle of a round.

    Raises:
        PeerLostError: a rank vanished meanwhile, or a piece arrived damaged.
    """
    own = Standing(_NOTHING, _NOTHING, 0)
    if progress is not None:
        # Who turns to a planned view has just trained with the others, and compared when that view began.
        digest = 0 if apart or aside is not None else digest_of(parts.model)
        own = Standing(progress.step, progress.validated_step, digest, epoch, int(midway))
    with failures_as_lost_peers("handing state over"):
        standings = _compare(world, own)
        part = (roles_apart if apart else roles)(standings)
        if part.teller is None:
            return Outcome(None, part, standings)
        return dataclasses.replace(_transfer(world, parts, progress, part, aside), standings=standings)


def digest_of(model: nn.Module) -> int:
    """The digest of a model's parameters."""
    return digest(parameter.detach() for parameter in model.parameters())


def digest(tensors: Iterable[Tensor]) -> int:
    """63 bits that differ, in all likelihood, between values that differ. Reads them once, at memory's speed."""
    sums = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.contiguous().reshape(-1).view(torch.uint8)
        words = flat[: flat.numel() // 4 * 4].view(torch.int32).sum(dtype=torch.int64)
        rest = flat[flat.numel() // 4 * 4 :].sum(dtype=torch.int64)
        sums.update(f"{int(words)} {int(rest)}".encode())
    return int.from_bytes(sums.digest()[:8], "little") >> 1


def _compare(world: World, own: Standing) -> list[Standing]:
    mine = torch.tensor(dataclasses.astuple(own), dtype=torch.int64)
    rows = [torch.empty_like(mine) for _ in range(world.size)]
    world.everybody.all_gather(rows, mine)
    return [Standing(*row.tolist()) for row in rows]


def _transfer(world: World, parts: Parts, progress: Progress | None, part: Roles, aside: Group | None) -> Outcome:
    document: Any = None
    tensors: dict[str, Tensor] = {}
    if world.rank in part.givers and part.takers:
        document, unordered = tree.encode(_state(parts), "state")
        # By name: an optimizer's state is in the order in which parameters were first used, on each rank its own.
        tensors = dict(sorted(unordered.items()))
    text = None
    if world.rank == part.teller:
        assert progress is not None
        described = {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()}
        text = json.dumps({"progress": progress.to_plain(), "state": document, "tensors": described}).encode()
    assert part.teller is not None
    message = json.loads(tell(world, text, part.teller))
    reached = Progress.from_plain(message["progress"])
    if progress is not None:
        reached = dataclasses.replace(reached, seconds=max(reached.seconds, progress.seconds))
    group = aside or world.everybody
    if world.rank in part.takers:
        taking = Taking(group, message, part)
        if aside is not None:
            return Outcome(reached, part, (), taking=taking)
        taking.take()
        taking.install(parts)
    elif part.takers and world.rank in part.givers:
        giving = Giving(group, [tensor.detach() for tensor in tensors.values()], part, world.rank)
        if aside is not None:
            return Outcome(reached, part, (), giving=giving)
        giving.give()
    return Outcome(reached, part, ())


def _state(parts: Parts) -> dict[str, Any]:
    return {
        "model": parts.replica.state_dict(),
        "optimizer": named_state(parts.optimizer, parts.replica),
        "schedule": parts.schedule.state_dict() if parts.schedule else None,
    }


def tell(world: World, text: bytes | None, teller: int) -> bytes:
    """Give all ranks the text of rank `teller`; None on the others. Collective."""
    size = torch.tensor([len(text) if text is not None else 0])
    world.everybody.broadcast(size, teller)
    content = torch.empty(int(size), dtype=torch.uint8)
    if text is not None:
        content = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    world.everybody.broadcast(content, teller)
    return content.numpy().tobytes()


class Giving:
    """One giver's part of the state.

    In the background it makes way for training: pieces leave while no gradients are on the wires, and besides as many
    a step as it takes to be done in `_MOST_STEPS`.
    """

    def __init__(self, group: Group, tensors: list[Tensor], part: Roles, rank: int) -> None:
        self._group = group
        self._memories = [bytes_of(tensor.cpu()) for tensor in tensors]
        self._part = part
        self._index = part.givers.index(rank)
        self._copied = threading.Event()
        self._changed = threading.Condition()
        self._is_exchanging = False
        self._overdue = 0  # so many pieces leave whatever is on the wires

    def give(self) -> None:
        """Send it; the tensors do not change meanwhile."""
        self._send(self._pieces(), self._memories, 0)

    def begin(self) -> None:
        """Copy it, then send the copy, in the background."""
        threading.Thread(target=self._copy_and_send, daemon=True, name="shoal-giving").start()

    def before_update(self) -> None:
        """Wait until it is copied: from then on the tensors may change."""
        self._copied.wait()

    def make_way(self) -> None:
        """From now on gradients are on the wires."""
        with self._changed:
            self._is_exchanging = True
            self._overdue += -(-sum(1 for _ in self._pieces()) // _MOST_STEPS)
            self._changed.notify_all()

    def go_on(self) -> None:
        """All gradients have arrived, or never will."""
        with self._changed:
            self._is_exchanging = False
            self._changed.notify_all()

    def _copy_and_send(self) -> None:
        try:
            pieces = list(self._pieces())
            start = pieces[0].start if pieces else 0
            copy = torch.empty(pieces[-1].stop - start if pieces else 0, dtype=torch.uint8)
            for piece in pieces:
                copy_range(self._memories, piece, copy[piece.start - start : piece.stop - start], into=False)
            self._copied.set()
            with contextlib.suppress(RuntimeError, PeerLostError):  # training waits for the same peers, and tells
                self._send(iter(pieces), [copy], start)
        finally:
            self._copied.set()

    def _pieces(self) -> Iterator[range]:
        return pieces_of(sum(map(len, self._memories)), self._index, len(self._part.givers))

    def _send(self, pieces: Iterator[range], memories: list[Tensor], start: int) -> None:
        under_way: list[Any] = []
        for number, piece in enumerate(pieces):
            self._wait_for_way(number)
            message = torch.empty(len(piece) + NUM_BYTES, dtype=torch.uint8)
            copy_range(memories, range(piece.start - start, piece.stop - start), message, into=False)
            message[len(piece) :] = checksum(message[: len(piece)])
            sent = [(message, self._group.send(message, taker)) for taker in self._part.takers]
            for _, work in under_way:
                work.wait()
            under_way = sent
        for _, work in under_way:
            work.wait()

    def _wait_for_way(self, number: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._is_exchanging or number < self._overdue)


class Taking:
    """What a taker is sent. Attributes: `tensors`: by name; whole when `take` or `wait` has returned."""

    def __init__(self, group: Group, message: dict[str, Any], part: Roles) -> None:
        """`message`: what the teller told."""
        self._group = group
        self._message = message
        self._part = part
        described = message["tensors"]
        self.tensors = {
            name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in described.items()
        }
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def begin(self) -> None:
        """Take it in the background."""
        self._thread = threading.Thread(target=self._run, daemon=True, name="shoal-taking")
        self._thread.start()

    @property
    def has_arrived(self) -> bool:
        """Whether it is there, or will never be: `wait` tells."""
        return self._thread is not None and not self._thread.is_alive()

    def wait(self) -> None:
        """Wait until it is there.

        Raises:
            PeerLostError: a giver vanished, or a piece arrived damaged.
        """
        assert self._thread is not None
        self._thread.join()
        if self._error is not None:
            raise PeerLostError(f"the state did not arrive: {self._error}") from self._error

    def install(self, parts: Parts) -> None:
        """Put it into this rank's parts."""
        state = tree.decode(self._message["state"], self.tensors)
        restore(parts, state | {"progress": self._message["progress"]})

    def take(self) -> None:
        """Receive every piece.

        Raises:
            PeerLostError: a piece arrived damaged.
        """
        memories = [bytes_of(tensor) for tensor in self.tensors.values()]
        total, givers = sum(map(len, memories)), self._part.givers
        streams = [(giver, pieces_of(total, index, len(givers))) for index, giver in enumerate(givers)]
        while streams:
            arriving = []
            for giver, pieces in list(streams):
                piece = next(pieces, None)
                if piece is None:
                    streams.remove((giver, pieces))
                    continue
                message = torch.empty(len(piece) + NUM_BYTES, dtype=torch.uint8)
                arriving.append((giver, piece, message, self._group.receive(message, giver)))
            for giver, piece, message, work in arriving:
                work.wait()
                what = f"a piece of the state (bytes {piece.start} to {piece.stop}) from rank {giver}"
                check(message[: len(piece)], message[len(piece) :], what)
                copy_range(memories, piece, message, into=True)

    def _run(self) -> None:
        try:
            self.take()
        except BaseException as error:
            self._error = error
