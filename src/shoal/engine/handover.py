"""When a view begins, every rank gets the state of those who have come furthest.

After a failure some ranks may have committed a step that others have not; a newcomer has nothing yet; and ranks whose
parameters differ although they should not must hear of it. So all compare how far they are and what they hold. Who is
behind takes everything from several peers at once, each of which sends another part. Each piece carries a checksum
(CRC-32): what arrives damaged ends the view, and is asked for again in the next.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shoal.engine.build import Parts
from shoal.engine.checkpoint import tree
from shoal.engine.layout.optimizer_state import named_state
from shoal.engine.loop import restore
from shoal.engine.progress import Progress
from shoal.errors import PeerLostError
from shoal.wire.groups import World, failures_as_lost_peers

_PIECE_BYTES = 4 << 20
_CHECKSUM_BYTES = 8
_NOTHING = -1


@dataclass(frozen=True)
class Standing:
    """How far a rank is: committed steps (-1: it has no state), the last step validated, what its parameters are."""

    step: int
    validated: int
    digest: int


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
    ahead = [rank for rank, standing in enumerate(standings) if standing.step == furthest]
    counts = Counter(standings[rank].digest for rank in ahead)
    most = max(counts.values())
    digest = next(standings[rank].digest for rank in ahead if counts[standings[rank].digest] == most)
    givers = [rank for rank in ahead if standings[rank].digest == digest]
    teller = max(givers, key=lambda rank: (standings[rank].validated, -rank))
    takers = [rank for rank in range(len(standings)) if rank not in givers]
    return Roles(teller, givers, takers, [rank for rank in ahead if rank not in givers])


def hand_over(world: World, parts: Parts, progress: Progress | None) -> tuple[Progress | None, Roles]:
    """Make all ranks of a view equal. Collective.

    Args:
        progress: how far this rank is; None if it has no state.

    Returns:
        How far all are now, None if nobody has any state; and who gave.

    Raises:
        PeerLostError: a rank vanished meanwhile, or a piece arrived damaged.
    """
    own = Standing(_NOTHING, _NOTHING, 0)
    if progress is not None:
        own = Standing(progress.step, progress.validated_step, digest_of(parts.model))
    with failures_as_lost_peers("handing state over"):
        all_ = _compare(world, own)
        part = roles(all_)
        if part.teller is None:
            return None, part
        return _transfer(world, parts, progress, part), part


def digest_of(model: nn.Module) -> int:
    """63 bits that differ, in all likelihood, between parameters that differ. Reads them once, at memory's speed."""
    sums = hashlib.sha256()
    for parameter in model.parameters():
        flat = parameter.detach().contiguous().reshape(-1).view(torch.uint8)
        words = flat[: flat.numel() // 4 * 4].view(torch.int32).sum(dtype=torch.int64)
        rest = flat[flat.numel() // 4 * 4 :].sum(dtype=torch.int64)
        sums.update(f"{int(words)} {int(rest)}".encode())
    return int.from_bytes(sums.digest()[:8], "little") >> 1


def _compare(world: World, own: Standing) -> list[Standing]:
    mine = torch.tensor(dataclasses.astuple(own), dtype=torch.int64)
    rows = [torch.empty_like(mine) for _ in range(world.size)]
    world.everybody.all_gather(rows, mine)
    return [Standing(*row.tolist()) for row in rows]


def _transfer(world: World, parts: Parts, progress: Progress | None, part: Roles) -> Progress:
    gives = world.rank in part.givers
    document: Any = None
    tensors: dict[str, Tensor] = {}
    if gives and part.takers:
        document, tensors = tree.encode(_state(parts), "state")
    if world.rank == part.teller:
        assert progress is not None
        described = {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()}
        text = json.dumps({"progress": progress.to_plain(), "state": document, "tensors": described}).encode()
        told = _tell(world, text, part.teller)
    else:
        assert part.teller is not None
        told = _tell(world, None, part.teller)
    message = json.loads(told)
    reached = Progress.from_plain(message["progress"])
    if progress is not None:
        reached = dataclasses.replace(reached, seconds=max(reached.seconds, progress.seconds))
    if gives:
        _give(world, list(tensors.values()), part)
        return reached
    made = {
        name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in message["tensors"].items()
    }
    _take(world, list(made.values()), part)
    state = tree.decode(message["state"], made)
    restore(parts, state | {"progress": message["progress"]})
    return reached


def _state(parts: Parts) -> dict[str, Any]:
    return {
        "model": parts.replica.state_dict(),
        "optimizer": named_state(parts.optimizer, parts.replica),
        "schedule": parts.schedule.state_dict() if parts.schedule else None,
    }


def _tell(world: World, text: bytes | None, teller: int) -> bytes:
    size = torch.tensor([len(text) if text is not None else 0])
    world.everybody.broadcast(size, teller)
    content = torch.empty(int(size), dtype=torch.uint8)
    if text is not None:
        content = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    world.everybody.broadcast(content, teller)
    return content.numpy().tobytes()


def _give(world: World, tensors: list[Tensor], part: Roles) -> None:
    index = part.givers.index(world.rank)
    memories = [_bytes_of(tensor.detach().cpu()) for tensor in tensors]
    under_way: list[Any] = []
    for piece in _pieces(sum(map(len, memories)), index, len(part.givers)):
        message = torch.empty(len(piece) + _CHECKSUM_BYTES, dtype=torch.uint8)
        _copy(memories, piece, message, into=False)
        message[len(piece) :] = _checksum(message[: len(piece)])
        sent = [world.everybody.send(message, taker) for taker in part.takers]
        for work in under_way:
            work.wait()
        under_way = sent
    for work in under_way:
        work.wait()


def _take(world: World, tensors: list[Tensor], part: Roles) -> None:
    memories = [_bytes_of(tensor) for tensor in tensors]
    total = sum(map(len, memories))
    streams = [(giver, _pieces(total, index, len(part.givers))) for index, giver in enumerate(part.givers)]
    while streams:
        arriving = []
        for giver, pieces in list(streams):
            piece = next(pieces, None)
            if piece is None:
                streams.remove((giver, pieces))
                continue
            message = torch.empty(len(piece) + _CHECKSUM_BYTES, dtype=torch.uint8)
            arriving.append((giver, piece, message, world.everybody.receive(message, giver)))
        for giver, piece, message, work in arriving:
            work.wait()
            if not torch.equal(message[len(piece) :], _checksum(message[: len(piece)])):
                raise PeerLostError(
                    f"a piece of the state (bytes {piece.start} to {piece.stop}) from rank {giver} arrived damaged: "
                    "its checksum differs; it was not used"
                )
            _copy(memories, piece, message, into=True)


def _pieces(total: int, index: int, count: int) -> Iterator[range]:
    """The ranges of bytes that giver `index` of `count` sends, in order."""
    start, end = total * index // count, total * (index + 1) // count
    for first in range(start, end, _PIECE_BYTES):
        yield range(first, min(first + _PIECE_BYTES, end))


def _copy(memories: Sequence[Tensor], piece: range, message: Tensor, *, into: bool) -> None:
    """Copy a range of the memories' bytes, taken as one, to a message's beginning, or back."""
    start = 0
    for memory in memories:
        first, last = max(piece.start - start, 0), min(piece.stop - start, len(memory))
        if first < last:
            there = message[start + first - piece.start : start + last - piece.start]
            memory[first:last].copy_(there) if into else there.copy_(memory[first:last])
        start += len(memory)
        if start >= piece.stop:
            return


def _bytes_of(tensor: Tensor) -> Tensor:
    """A tensor's memory as bytes, shape (n,); a copy if it is not contiguous."""
    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8) if flat.numel() else torch.empty(0, dtype=torch.uint8)


def _checksum(content: Tensor) -> Tensor:
    value = zlib.crc32(content.numpy().data)
    return torch.frombuffer(bytearray(value.to_bytes(_CHECKSUM_BYTES, "little")), dtype=torch.uint8)
