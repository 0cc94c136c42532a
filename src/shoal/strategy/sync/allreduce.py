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
        lanes: how many buckets are on the network at once, each over connections of its own; 0 decides by itself.
    """

    __pydantic_config__: ClassVar = STRICT
    kind: Literal["allreduce"] = "allreduce"
    form: Literal["auto", "flat", "hierarchical"] = "auto"
    bucket_mb: Annotated[float, pydantic.Field(gt=0, le=1024)] = 4.0
    lanes: Annotated[int, pydantic.Field(ge=0, le=16)] = 0


class AllReduceSync:
    """The exchange of one bucket, each step."""

    def __init__(self, config: AllReduceConfig, codec: Codec, topology: Topology) -> None:
        self._codec = codec
        self._topology = topology
        self._lanes = config.lanes
        self.hierarchical = config.form != "flat" and topology.has_neighbours

    @property
    def groups(self) -> set[str]:
        """The groups whose transports this sync needs."""
        if not self.hierarchical:
            return {WORLD}
        return {NODE, LEADERS} if len(self._topology.leaders) > 1 else {NODE}

    def num_lanes(self, device: str) -> int:
        """How many exchanges run at once.

        In shared memory one keeps all cores busy; NCCL may deadlock when two communicators run at once.
        """
        return self._lanes or (1 if device == "cuda" or self.groups == {NODE} else 2)

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
            yield from _sum(bucket, bucket.source, WORLD, self._topology, codec)
            return
        yield AllReduce(bucket.source, bucket.target, NODE)
        if LEADERS in self.groups:
            if self._topology.is_leader:
                yield from _sum(bucket, bucket.target, LEADERS, self._topology, codec)
            yield Broadcast(bucket.target, 0, NODE)


def _sum(bucket: Bucket, source: Tensor, group: str, topology: Topology, codec: Codec | None) -> Exchange:
    """Sum `source` (the bucket's, or what its node has summed already) over a group into the bucket's target."""
    members = topology.members(group)
    if codec is None or codec.linear or len(members) == 1:
        yield AllReduce(source, bucket.target, group)
    else:
        yield from _encoded_sum(bucket, source, group, len(members), codec)


def _encoded_sum(bucket: Bucket, source: Tensor, group: str, size: int, codec: Codec) -> Exchange:
    values, flags = source[: bucket.num_values], (source[bucket.num_values :] > 0).to(torch.uint8)
    length = -(-values.numel() // size)
    rows = torch.nn.functional.pad(values, (0, size * length - values.numel())).view(size, length)
    encoded = codec.encode(rows)  # (size, bytes)
    received = yield AllToAll(torch.cat([encoded, flags.expand(size, -1)], dim=1), group)
    mine = codec.decode(received[:, : encoded.shape[1]].contiguous(), like=source).sum(dim=0, keepdim=True)
    gathered = yield AllGather(codec.encode(mine)[0], group)
    bucket.target[: bucket.num_values] = codec.decode(gathered, like=source).view(-1)[: bucket.num_values]
    bucket.target[bucket.num_values :] = received[:, encoded.shape[1] :].sum(dim=0)
