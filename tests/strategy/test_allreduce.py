"""The all-reduce exchange over every small cluster, played in one process."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shoal.ops import LEADERS, NODE, WORLD
from shoal.plan import parse_plan
from shoal.strategy.bucket import Bucket
from shoal.strategy.codec import CODECS, make_codec
from shoal.strategy.codec.feedback import Coder
from shoal.strategy.sync.allreduce import AllReduceConfig, AllReduceSync
from shoal.strategy.topology import topologies
from shoal.wire.inprocess import run_in_process
from shoal.wire.transport import Memory

BF16_ROUNDING = 2.0**-8
LAYOUTS = [
    "a",
    "aa",
    "ab",
    "aaa",
    "aab",
    "abb",
    "aba",
    "abc",
    "aaaa",
    "aabb",
    "abab",
    "abcd",
    "aaabb",
    "abbcc",
    "abcde",
]
layouts = st.sampled_from(LAYOUTS)
sizes = st.sampled_from([0, 1, 2, 7, 31, 64, 257])
forms = st.sampled_from(["auto", "flat", "hierarchical"])
seeds = st.integers(0, 2**31)


def buckets(layout: str, num_values: int, num_flags: int, seed: int, *, shared: bool = False) -> list[Bucket]:
    """A bucket a rank, random values and flags; `shared`: source and target are apart, as in shared memory."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in layout:
        source = torch.randn(num_values + num_flags, generator=generator, dtype=torch.float64)
        source[num_values:] = (source[num_values:] > 0).double()
        target = torch.full_like(source, 777.0) if shared else source
        made.append(Bucket.over("bucket", Memory(source, target, slice(0, len(source))), num_values))
    return made


def coder(kind: str, rank: int) -> Coder | None:
    """A codec as a rank uses it, with its default settings."""
    if kind == "none":
        return None
    config = parse_plan(f'codec.kind = "{kind}"', origin="test").codec
    return Coder(make_codec(config), config, rank=rank)


def exchange(layout: str, form: str, codec: str, made: Sequence[Bucket], *, exact: bool = False) -> list[AllReduceSync]:
    """Run one bucket's exchange on all ranks."""
    views = topologies(layout)
    syncs = [AllReduceSync(AllReduceConfig(form=form), coder(codec, view.rank), view) for view in views]
    pairs = zip(syncs, made, strict=True)
    run_in_process(
        [sync.exchange_exact(bucket) if exact else sync.exchange(bucket) for sync, bucket in pairs],
        lambda rank, group: views[rank].members(group),
    )
    return syncs


def contributions(made: Sequence[Bucket]) -> Tensor:
    return torch.stack([bucket.source for bucket in made]).clone()  # (num_ranks, n)


@given(layout=layouts, num_values=sizes, num_flags=st.integers(0, 3), form=forms, seed=seeds, shared=st.booleans())
def test_every_rank_gets_the_sum_of_all(
    layout: str, num_values: int, num_flags: int, form: str, seed: int, shared: bool
) -> None:
    made = buckets(layout, num_values, num_flags, seed, shared=shared)
    total = contributions(made).sum(dim=0)
    exchange(layout, form, "none", made)
    for bucket in made:
        torch.testing.assert_close(bucket.target, total, rtol=1e-13, atol=1e-13)
        assert torch.equal(bucket.target, made[0].target)


@given(layout=layouts, num_values=sizes, num_flags=st.integers(0, 3), form=forms, seed=seeds, shared=st.booleans())
def test_a_lossy_codec_rounds_values_twice_at_most_and_never_flags(
    layout: str, num_values: int, num_flags: int, form: str, seed: int, shared: bool
) -> None:
    made = buckets(layout, num_values, num_flags, seed, shared=shared)
    before = contributions(made)
    exchange(layout, form, "bf16", made)
    # A contribution (or its node's sum) is rounded once, and their sum once: (1 + e)**2 - 1 of the sum of magnitudes.
    bound = ((1 + BF16_ROUNDING) ** 2 - 1) * before.abs().sum(dim=0)
    for bucket in made:
        assert torch.all((bucket.target - before.sum(dim=0)).abs()[:num_values] <= bound[:num_values])
        assert torch.equal(bucket.target[num_values:] > 0, before[:, num_values:].sum(dim=0) > 0)
        assert torch.equal(bucket.target, made[0].target)


@given(layout=layouts, num_values=sizes, form=forms, seed=seeds)
def test_an_exact_exchange_passes_the_codec_by(layout: str, num_values: int, form: str, seed: int) -> None:
    made = buckets(layout, num_values, 0, seed)
    total = contributions(made).sum(dim=0)
    exchange(layout, form, "bf16", made, exact=True)
    torch.testing.assert_close(made[-1].target, total, rtol=1e-13, atol=1e-13)


@given(layout=layouts, num_values=sizes, form=forms, seed=seeds)
def test_the_same_contributions_give_the_same_bits(layout: str, num_values: int, form: str, seed: int) -> None:
    first, second = (buckets(layout, num_values, 1, seed) for _ in range(2))
    exchange(layout, form, "bf16", first)
    exchange(layout, form, "bf16", second)
    assert all(torch.equal(one.target, other.target) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("layout", "form", "groups"),
    [
        ("abc", "auto", {WORLD}),
        ("aaa", "auto", {NODE}),
        ("aab", "auto", {NODE, LEADERS}),
        ("aab", "flat", {WORLD}),
        ("abc", "hierarchical", {WORLD}),
        ("a", "auto", {WORLD}),
    ],
)
def test_every_rank_asks_for_the_same_groups(layout: str, form: str, groups: set[str]) -> None:
    for sync in exchange(layout, form, "none", buckets(layout, 3, 0, 0)):
        assert sync.groups == groups
        assert sync.hierarchical == (groups != {WORLD})


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("layout", ["ab", "aab", "abcd"])
def test_non_finite_values_reach_every_rank_through_every_codec(codec: str, layout: str) -> None:
    for bad in (torch.nan, torch.inf):
        made = buckets(layout, 3, 2, 0)
        made[1].source[0] = bad
        exchange(layout, "auto", codec, made)
        for bucket in made:
            assert not bucket.target[:3].isfinite().all()
            assert bucket.target[3:].isfinite().all()
            assert torch.equal(bucket.target.nan_to_num(), made[0].target.nan_to_num())


def test_only_the_values_themselves_become_non_finite_where_each_goes_its_own_way() -> None:
    for codec in ("none", "bf16"):
        made = buckets("aab", 3, 0, 0)
        made[1].source[0], made[2].source[1] = torch.nan, torch.inf
        exchange("aab", "auto", codec, made)
        for bucket in made:
            assert torch.isnan(bucket.target[0])
            assert torch.isinf(bucket.target[1])
            assert torch.isfinite(bucket.target[2])


def test_ranks_that_come_to_different_operations_are_told() -> None:
    views = topologies("ab")
    made = buckets("ab", 3, 0, 0)
    coders = [coder("none", 0), coder("bf16", 1)]
    syncs = [AllReduceSync(AllReduceConfig(), own, view) for own, view in zip(coders, views, strict=True)]
    exchanges = [sync.exchange(bucket) for sync, bucket in zip(syncs, made, strict=True)]
    with pytest.raises(AssertionError, match="different operations"):
        run_in_process(exchanges, lambda rank, group: views[rank].members(group))
