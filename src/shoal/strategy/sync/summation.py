"""The sum of one bucket over all ranks, weighted beforehand: what all-reduce and local steps have in common.

Two forms. *Flat*: all ranks take part in one collective over the network. *Hierarchical* (BlueConnect, Cho et al.
2019; also Horovod's): the ranks of a node reduce among themselves first, in shared memory or by NCCL, and one rank
per node crosses the network, so each byte leaves a node once however many ranks it holds.

A linear codec's projections are summed as they are. Any other is applied as reduce-scatter, then all-gather, both of
encoded values with the sum in full precision in between; every rank decodes the same bytes, so replicas stay
bit-identical. Error feedback stands at both encodings, as in DoubleSqueeze (Tang et al. 2019). Where the coder holds
a momentum for a bucket, that is what is exchanged in place of its gradients.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from shoal.ops import LEADERS, NODE, WORLD, AllGather, AllReduce, AllToAll, Barrier, Broadcast, Exchange
from shoal.strategy.bucket import Bucket
from shoal.strategy.codec.feedback import Coder
from shoal.strategy.codec.momentum import Momentum
from shoal.strategy.sync.algorithms import ALGORITHMS, Algorithm
from shoal.strategy.topology import Topology

Form = Literal["auto", "flat", "hierarchical"]


class Summation:
    """Sums buckets; `coder` None sends everything as it is."""

    def __init__(self, topology: Topology, coder: Coder | None, form: Form, algorithm: Algorithm) -> None:
        self._topology = topology
        self._coder = coder
        self._algorithm = algorithm
        self.hierarchical = form != "flat" and topology.has_neighbours

    @property
    def groups(self) -> set[str]:
        """The groups whose transports it needs."""
        if not self.hierarchical:
            return {WORLD}
        return {NODE, LEADERS} if len(self._topology.leaders) > 1 else {NODE}

    @property
    def crosses_network(self) -> bool:
        """Whether anything leaves this rank's machine."""
        return bool(self.groups & {WORLD, LEADERS})

    @property
    def codec_acts(self) -> bool:
        """Whether there is a codec and a network for it."""
        return self._coder is not None and self.crosses_network and self._topology.world_size > 1

    def fence(self) -> Exchange:
        """Before sources are written again: wait until no rank of the node still reads the last results."""
        if self.hierarchical:
            yield Barrier(NODE)

    def exchange(self, bucket: Bucket) -> Exchange:
        """Sum `bucket.source` over all ranks into `bucket.target`."""
        coder = self._coder if self.codec_acts else None
        yield from self._exchange(bucket, coder.choose(bucket.name) if coder is not None else None)

    def exchange_exact(self, bucket: Bucket) -> Exchange:
        """The same without the codec: for counts and flags, which must arrive as they are."""
        yield from self._exchange(bucket, None)

    def _exchange(self, bucket: Bucket, coder: Coder | None) -> Exchange:
        if not self.hierarchical:
            yield from self._sum(bucket, bucket.source, WORLD, coder)
            return
        yield AllReduce(bucket.source, bucket.target, NODE)
        if LEADERS in self.groups:
            if self._topology.is_leader:
                yield from self._sum(bucket, bucket.target, LEADERS, coder)
            yield Broadcast(bucket.target, 0, NODE)

    def _sum(self, bucket: Bucket, source: Tensor, group: str, coder: Coder | None) -> Exchange:
        """Sum `source` (the bucket's, or what its node has summed already) over a group into the bucket's target."""
        members = self._topology.members(group)
        if len(members) > 1 and coder is not None:
            if coder.codec.linear:
                yield from _projected_sum(bucket, source, group, len(members), coder)
            else:
                yield from _encoded_sum(bucket, source, group, len(members), coder)
        elif self._algorithm == "library" or len(members) == 1:
            yield AllReduce(source, bucket.target, group)
        else:
            if source is not bucket.target:
                bucket.target.copy_(source)
            index = members.index(self._topology.rank)
            yield from ALGORITHMS[self._algorithm](bucket.target, group, index, len(members))


def _projected_sum(bucket: Bucket, source: Tensor, group: str, size: int, coder: Coder) -> Exchange:
    """The flags ride with the first projection."""
    flags = source[bucket.num_values :].clone()
    momentum, values = coder.momenta.get(bucket.name), source[: bucket.num_values]
    if momentum is not None:
        values = momentum.part(values, size)
    projection = coder.project(bucket.name, values, bucket.pieces)
    riding = flags
    try:
        projected = next(projection)
        while True:
            joined = torch.cat([projected.reshape(-1), riding])
            yield AllReduce(joined, joined, group)
            projected.copy_(joined[: projected.numel()].view_as(projected))
            if riding.numel():
                bucket.target[bucket.num_values :] = joined[projected.numel() :]
                riding = riding[:0]
            projected = projection.send(None)
    except StopIteration as stop:
        total, _ = stop.value
        _put(bucket, total, momentum)


def _encoded_sum(bucket: Bucket, source: Tensor, group: str, size: int, coder: Coder) -> Exchange:
    values, flags = source[: bucket.num_values], (source[bucket.num_values :] > 0).to(torch.uint8)
    momentum = coder.momenta.get(bucket.name)
    if momentum is not None:
        values = momentum.part(values, size)
    length = -(-values.numel() // size)
    rows = torch.nn.functional.pad(values, (0, size * length - values.numel())).view(size, length)
    encoded = coder.encode(bucket.name, rows)  # (size, bytes)
    received = yield AllToAll(torch.cat([encoded, flags.expand(size, -1)], dim=1), group)
    parts = coder.decode(received[:, : encoded.shape[1]].contiguous(), length, source)
    mine = parts.sum(dim=0, keepdim=True)
    gathered = yield AllGather(coder.encode(bucket.name, mine, stage="sum")[0], group)
    _put(bucket, coder.decode(gathered, length, source).flatten()[: bucket.num_values], momentum)
    bucket.target[bucket.num_values :] = received[:, encoded.shape[1] :].sum(dim=0)


def _put(bucket: Bucket, total: Tensor, momentum: Momentum | None) -> None:
    target = bucket.target[: bucket.num_values]
    if momentum is None:
        target.copy_(total)
    else:
        torch.mul(total, momentum.units, out=target)
    for gap in bucket.gaps:  # a codec may decode a zero to something else
        target[gap] = 0
