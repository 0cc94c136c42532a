"""Synchronous all-reduce: every rank gets the exact sum of all ranks' gradients before it takes a step.

Two forms. *Flat*: all ranks take part in one collective over the network. *Hierarchical* (BlueConnect, Cho et al.
2019; also Horovod's): the ranks of a node reduce among themselves first, in shared memory or by NCCL, and one rank
per node crosses the network, so each byte leaves a node once however many ranks it holds.

Averaging is not done here: each rank scales its loss by its share of the global batch, so that a sum is the mean.

A codec that is not linear is applied as reduce-scatter, then all-gather, both of encoded values with the sum in full
precision in between; every rank decodes the same bytes, so replicas stay bit-identical.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import pydantic
import torch
from torch import Tensor

from shoal.ops import LEADERS, NODE, WORLD, AllGather, AllReduce, AllToAll, Barrier, Broadcast, Exchange
from shoal.strategy.bucket import Bucket
from shoal.strategy.codec import Codec
from shoal.strategy.topology import Topology
from shoal.strict_toml import STRICT


@dataclass(frozen=True, kw_only=True)
class AllReduceConfig:
    """`[sync] kind = "allreduce"`.

    Attributes:
        form: "hierarchical" reduces inside each node first; "flat" sends every rank over the network; "auto" is
            hierarchical wherever a node holds more than one rank.
        bucket_mb: the size, in MB of gradient, at which a bucket is closed and sent.
    """

    __pydantic_config__: ClassVar = STRICT
    kind: Literal["allreduce"] = "allreduce"
    form: Literal["auto", "flat", "hierarchical"] = "auto"
    bucket_mb: Annotated[float, pydantic.Field(gt=0, le=1024)] = 4.0


class AllReduceSync:
    """The exchange of one bucket, each step."""

    def __init__(self, config: AllReduceConfig, codec: Codec, topology: Topology) -> None:
        self._codec = codec
        self._topology = topology
        self.hierarchical = config.form != "flat" and topology.has_neighbours

    @property
    def groups(self) -> set[str]:
        """The groups whose transports this sync needs."""
        if not self.hierarchical:
            return {WORLD}
        return {NODE, LEADERS} if len(self._topology.leaders) > 1 else {NODE}

    def fence(self) -> Exchange:
        """Before gradients are written again: wait until no rank of the node still reads the last step's."""
        if self.hierarchical:
            yield Barrier(NODE)

    def exchange(self, bucket: Bucket) -> Exchange:
        """Sum `bucket.source` over all ranks into `bucket.target`."""
        yield from self._exchange(bucket, self._codec)

    def exchange_exact(self, bucket: Bucket) -> Exchange:
        """The same without the codec: for counts and flags, which must arrive as they are."""
        yield from self._exchange(bucket, None)

    def _exchange(self, bucket: Bucket, codec: Codec | None) -> Exchange:
        if not self.hierarchical:
            yield from _sum(bucket.source, bucket.target, WORLD, self._topology, codec)
            return
        yield AllReduce(bucket.source, bucket.target, NODE)
        if LEADERS in self.groups:
            if self._topology.is_leader:
                yield from _sum(bucket.target, bucket.target, LEADERS, self._topology, codec)
            yield Broadcast(bucket.target, 0, NODE)


def _sum(source: Tensor, target: Tensor, group: str, topology: Topology, codec: Codec | None) -> Exchange:
    members = topology.members(group)
    if codec is None or codec.linear or len(members) == 1:
        yield AllReduce(source, target, group)
    else:
        yield from _encoded_sum(source, target, group, len(members), codec)


def _encoded_sum(source: Tensor, target: Tensor, group: str, size: int, codec: Codec) -> Exchange:
    length = -(-source.numel() // size)
    rows = torch.nn.functional.pad(source, (0, size * length - source.numel())).view(size, length)
    received = yield AllToAll(codec.encode(rows), group)
    mine = codec.decode(received, like=source).sum(dim=0, keepdim=True)  # (1, length)
    gathered = yield AllGather(codec.encode(mine)[0], group)
    target.copy_(codec.decode(gathered, like=source).view(-1)[: target.numel()])
