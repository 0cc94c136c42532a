"""Mixing keeps the mean, brings replicas together, and does both under every codec."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import PlanError
from shoal.plan import parse_plan
from shoal.plan.capability import UNSOUND
from shoal.strategy.bucket import Bucket
from shoal.strategy.codec import CODECS, make_codec
from shoal.strategy.codec.feedback import Coder
from shoal.strategy.sync import graph
from shoal.strategy.sync.gossip import GossipConfig, GossipSync
from shoal.strategy.topology import topologies
from shoal.wire.inprocess import run_in_process
from shoal.wire.transport import Memory

TOPOLOGIES = ["ring", "torus", "exponential"]


def cluster(size: int, num_values: int, topology: str, codec: str) -> tuple[list[GossipSync], list[Bucket]]:
    """A sync and a bucket of random values for each rank."""
    generator = torch.Generator().manual_seed(size * 1000 + num_values)
    views = topologies([str(rank) for rank in range(size)])
    config = parse_plan(f'codec.kind = "{codec}"\ncodec.error_feedback = false', origin="test").codec
    syncs, buckets = [], []
    for view in views:
        coder = None if codec == "none" else Coder(make_codec(config), config, rank=view.rank)
        syncs.append(GossipSync(GossipConfig(topology=topology, gamma=0.2), coder, view))
        values = torch.randn(num_values, generator=generator, dtype=torch.float64)
        buckets.append(Bucket.over("bucket", Memory(values, values, slice(0, num_values)), num_values))
    return syncs, buckets


def mix(syncs: list[GossipSync], buckets: list[Bucket], step: int) -> None:
    run_in_process(
        [sync.mix(bucket, step) for sync, bucket in zip(syncs, buckets, strict=True)],
        lambda rank, group: range(len(syncs)),
    )


@pytest.mark.parametrize("topology", [*TOPOLOGIES, "matching"])
@given(size=st.integers(1, 9), num_values=st.sampled_from([0, 1, 64]))
@settings(max_examples=25)
def test_mixing_keeps_the_mean_and_brings_replicas_together(topology: str, size: int, num_values: int) -> None:
    syncs, buckets = cluster(size, num_values, topology, "none")
    before = torch.stack([bucket.source.clone() for bucket in buckets])
    for step in range(60):
        mix(syncs, buckets, step)
    after = torch.stack([bucket.target for bucket in buckets])
    torch.testing.assert_close(after.mean(dim=0), before.mean(dim=0), rtol=0, atol=1e-12)
    spread_before, spread_after = ((v - v.mean(dim=0)).norm() for v in (before, after))
    assert spread_after <= 0.01 * spread_before + 1e-12


@pytest.mark.parametrize("codec", [name for name in CODECS if name != "none" and ("gossip", name) not in UNSOUND])
def test_differences_keep_the_mean_and_bring_replicas_together_under_any_codec(codec: str) -> None:
    syncs, buckets = cluster(4, 300, "ring", codec)
    before = torch.stack([bucket.source.clone() for bucket in buckets])
    for step in range(120):
        mix(syncs, buckets, step)
    after = torch.stack([bucket.target for bucket in buckets])
    torch.testing.assert_close(after.mean(dim=0), before.mean(dim=0), rtol=0, atol=1e-9)
    spread_before, spread_after = ((v - v.mean(dim=0)).norm() for v in (before, after))
    assert spread_after < 0.8 * spread_before, (codec, spread_after / spread_before)


@pytest.mark.parametrize("size", range(1, 14))
def test_every_named_graph_connects_all_ranks_in_rounds_of_pairs(size: int) -> None:
    for made in (graph.ring(size), graph.torus(size), graph.exponential(size)):
        assert made.unreached() == []
        rounds = made.rounds()
        assert sorted(edge for pairs in rounds for edge in pairs) == sorted(made.edges)
        for pairs in rounds:
            assert len({rank for edge in pairs for rank in edge}) == 2 * len(pairs)


def test_edges_that_do_not_connect_the_ranks_are_refused_by_name() -> None:
    with pytest.raises(PlanError, match="nothing from rank 0 reaches rank 2"):
        graph.declared(4, [(0, 1), (2, 3)])
    with pytest.raises(PlanError, match="names rank 4, but there are ranks 0 to 3"):
        graph.declared(4, [(0, 4)])
