"""When a view begins, its ranks put the state together again: each takes the rows that it holds from now on.

Nobody holds the whole: rows go from whoever has them to whoever needs them, each piece with a checksum.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import safetensors.torch
import torch

from shoal.engine.checkpoint import tree
from shoal.engine.shards.choice import Choice, Label
from shoal.engine.shards.shard import Shard
from shoal.engine.shards.streams import Memories, gather, swap
from shoal.wire.checksum import NUM_BYTES, check, checksum
from shoal.wire.groups import World

Shapes = Mapping[str, Sequence[int]]
"""Of the whole parameters, by name."""


def compare(world: World, own: Sequence[Label]) -> list[list[Label]]:
    """What every rank holds, by rank. Collective.

    Raises:
        RuntimeError, PeerLostError: a rank vanished.
    """
    told = gather(world.everybody, [dataclasses.astuple(label) for label in own])
    return [[Label(*label) for label in labels] for labels in told]


def describe(world: World, choice: Choice, own: Mapping[int, Shard]) -> dict[str, Any]:
    """What the chosen state's shards have in common, as its teller tells it. Collective.

    Raises:
        PeerLostError: it arrived damaged.
        RuntimeError, PeerLostError: a rank vanished.
    """
    text = None
    if world.rank == choice.teller:
        document, tensors = tree.encode(dict(own[0].common), "common")
        plain = json.dumps(document).encode()
        packed = safetensors.torch.save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
        text = len(plain).to_bytes(8, "little") + plain + packed
        text += checksum(_bytes(text)).numpy().tobytes()
    told = world.tell(text, choice.teller)
    content, end = told[:-NUM_BYTES], 8 + int.from_bytes(told[:8], "little")
    check(_bytes(content), _bytes(told[-NUM_BYTES:]), "what all shards have in common")
    common: dict[str, Any] = tree.decode(json.loads(content[8:end]), safetensors.torch.load(content[end:]))
    return common


def move(
    world: World,
    choice: Choice,
    own: Mapping[int, Shard],
    fresh: Shard,
    indices: Sequence[int],
    shapes: Shapes,
) -> None:
    """Fill `fresh` with its rows of the chosen state, and give others theirs. Collective.

    Args:
        own: this rank's shards of the chosen state.
        indices: by rank, the shard that it is to hold, of as many as `fresh` is one of.

    Raises:
        PeerLostError: a piece arrived damaged.
        RuntimeError, PeerLostError: a rank vanished.
    """
    rank, count, old = world.rank, fresh.label.count, range(choice.key.shards)
    outgoing: dict[int, list[torch.Tensor]] = {}
    for taker, index in enumerate(indices):
        for place in old:
            if choice.giver(place, taker) == rank:
                outgoing.setdefault(taker, []).extend(own[place].rows(shapes, index, count))
    incoming: dict[int, list[torch.Tensor]] = {}
    for place in old:
        incoming.setdefault(choice.giver(place, rank), []).extend(fresh.rows(shapes, place, choice.key.shards))
    _copy(outgoing.pop(rank, []), incoming.pop(rank, []))
    swap(world.everybody, outgoing, incoming, "a shard")


def _copy(source: Memories, target: Memories) -> None:
    for one, other in zip(source, target, strict=True):
        other.copy_(one)


def _bytes(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
