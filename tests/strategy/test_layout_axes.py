"""Grids, regions and cuts: what they promise, over many sizes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.strategy.layout.bubble import bubble
from shoal.strategy.layout.config import LayoutConfig
from shoal.strategy.layout.cut import Weight, cut
from shoal.strategy.layout.grid import AXES, WITHIN, arrange, explain, nearest_products, replicas
from shoal.strategy.layout.region import Region
from shoal.strategy.topology import Topology

sizes = st.integers(1, 3)


@given(replicate=sizes, pipeline=sizes, shard=sizes, tensor=sizes)
def test_every_rank_stands_in_one_place_and_in_one_group_of_each_kind(
    replicate: int, pipeline: int, shard: int, tensor: int
) -> None:
    config = LayoutConfig(replicate=replicate, pipeline=pipeline, shard=shard, tensor=tensor)
    world_size = replicate * pipeline * shard * tensor
    grid = arrange(config, ["n"] * world_size)
    places = {tuple(grid.index(rank, axis) for axis in AXES) for rank in range(world_size)}
    assert places == set(itertools.product(*map(range, grid.sizes)))
    for axes in [(axis,) for axis in AXES] + [WITHIN]:
        groups = grid.groups(*axes)
        assert sorted(itertools.chain(*groups)) == list(range(world_size))
        assert {len(group) for group in groups} == {math.prod(grid.size(axis) for axis in axes)}
    assert {grid.feed(rank) for rank in range(world_size)} == set(range(grid.feeds))
    for rank, other in itertools.combinations(range(world_size), 2):
        assert (grid.dice(rank) == grid.dice(other)) == (other in grid.group(rank, "tensor"))


def test_the_talkative_axes_lie_inside_nodes_even_if_ranks_are_numbered_across() -> None:
    nodes = ["a", "b", "a", "b"]
    grid = arrange(LayoutConfig(replicate=2, tensor=2), nodes)
    assert grid.group(0, "tensor") == [0, 2]
    assert grid.group(0, "replicate") == [0, 1]
    assert [s.partition(":")[0] for s in explain(grid, nodes)] == [
        "tensor = 2 lies inside nodes",
        "replicate = 2 lies across nodes",
    ]
    assert replicas(grid, Topology(2, tuple(nodes))) == Topology(0, ("a", "b"))
    uneven = ["a", "a", "a", "b"]
    assert (
        "tensor = 2 lies across nodes in 1 of 2 groups"
        in explain(arrange(LayoutConfig(replicate=2, tensor=2), uneven), uneven)[0]
    )


def test_the_nearest_products_fit_and_open_no_axis_that_was_left_alone() -> None:
    found = nearest_products(LayoutConfig(shard=3), 8)
    assert all(math.prod(sizes.values()) == 8 for sizes in found)
    assert found[0] == {"replicate": 2, "pipeline": 1, "shard": 4, "tensor": 1} or found[0]["tensor"] == 1


@given(
    rows=st.integers(1, 13),
    columns=st.integers(1, 4),
    tensor=sizes,
    shard=st.integers(1, 5),
    way=st.sampled_from("rcf"),
)
def test_the_regions_of_all_ranks_make_the_whole(rows: int, columns: int, tensor: int, shard: int, way: str) -> None:
    rows, columns = rows * tensor * 3, columns * tensor
    whole = torch.arange(rows * columns).reshape(rows, columns)
    region = Region.whole(whole.shape)
    made = torch.full_like(whole, -1)
    count = 0
    for t, s in itertools.product(range(tensor), range(shard)):
        part = {
            "r": region.of_rows(t, tensor),
            "c": region.of_columns(t, tensor),
            "f": region.of_fused_rows(t, tensor, 3),
        }[way].of_rows(s, shard)
        values = part.take(whole)
        assert tuple(values.shape) == part.local_shape
        assert Region.from_plain(part.to_plain()) == part
        part.put(values, made)
        count += part.num_values
    assert torch.equal(made, whole)
    assert count == whole.numel()


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0)])
def test_regions_of_almost_nothing(shape: tuple[int, ...]) -> None:
    whole = torch.zeros(shape)
    region = Region.whole(shape)
    assert region.take(whole).shape == whole.shape
    assert region.num_values == whole.numel()


def test_rows_are_cut_as_torch_cuts_them() -> None:
    whole = torch.arange(7)
    parts = [Region.whole((7,)).of_rows(index, 4).take(whole) for index in range(4)]
    assert [part.tolist() for part in parts] == [[0, 1], [2, 3], [4, 5], [6]]
    assert Region.whole((2,)).of_rows(2, 3).local_shape == (0,)


@given(
    loads=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8), stages=st.integers(1, 8)
)
def test_cuts_are_the_best_of_all(loads: list[tuple[int, int]], stages: int) -> None:
    weights = [Weight(float(seconds), float(size)) for seconds, size in loads]
    if stages > len(weights):
        with pytest.raises(ValueError, match="cannot make"):
            cut(weights, stages)
        return

    def heaviest(bounds: tuple[int, ...]) -> float:
        total_s, total_b = (sum(values) or 1 for values in zip(*loads, strict=True))
        parts = [loads[start:stop] for start, stop in itertools.pairwise((0, *bounds, len(loads)))]
        return max(max(sum(s for s, _ in p) / total_s, sum(b for _, b in p) / total_b) for p in parts)

    found = cut(weights, stages)
    assert [r.start for r in found[1:]] == [r.stop for r in found[:-1]]
    assert all(len(part) > 0 for part in found)
    best = min(heaviest(bounds) for bounds in itertools.combinations(range(1, len(loads)), stages - 1))
    assert heaviest(tuple(part.start for part in found[1:])) == pytest.approx(best)


def test_the_bubble_shrinks_with_micro_batches_and_stages() -> None:
    assert bubble(LayoutConfig(pipeline=4, micro_batches=4)) == pytest.approx(3 / 7)
    assert bubble(LayoutConfig(pipeline=4, micro_batches=4, stages=2, schedule="interleaved")) == pytest.approx(3 / 11)
    assert bubble(LayoutConfig(pipeline=4, micro_batches=4, stages=2, schedule="zero_bubble")) == pytest.approx(1 / 9)
