"""Sharding: every row on exactly one primary, balanced, and the same answer everywhere."""

from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shoal.strategy.sync.sharding import assign, server_of_rows

SHAPES = st.dictionaries(
    st.text(min_size=1, max_size=5), st.lists(st.integers(0, 40), max_size=3).map(tuple), min_size=1, max_size=8
)


@given(shapes=SHAPES, num_servers=st.integers(2, 5), piece_bytes=st.integers(1, 500))
def test_pieces_cover_every_row_once_and_are_balanced(
    shapes: dict[str, tuple[int, ...]], num_servers: int, piece_bytes: int
) -> None:
    pieces = assign(shapes, dict.fromkeys(shapes, 4), num_servers, replicate=True, piece_bytes=piece_bytes)
    loads = [0] * num_servers
    for name, shape in shapes.items():
        own = [piece for piece in pieces if piece.parameter == name]
        assert own[0].start == 0
        assert own[-1].stop == (shape[0] if shape else 0)
        assert all(a.stop == b.start for a, b in itertools.pairwise(own))
        assert sum(piece.size_bytes for piece in own) == math.prod(shape) * 4
        row_bytes = math.prod(shape[1:]) * 4
        assert all(piece.size_bytes <= max(piece_bytes, row_bytes) for piece in own)
    for piece in pieces:
        assert piece.replica != piece.primary
        loads[piece.primary] += piece.size_bytes
    assert max(loads) <= sum(loads) / num_servers + max(piece.size_bytes for piece in pieces)
    assert len({piece.key for piece in pieces}) == len(pieces)


def test_rows_are_spread_evenly_also_where_ids_are_regular() -> None:
    for ids in (np.arange(10_000), np.arange(10_000) * 4096, np.arange(10_000) * 3 + 2**40):
        counts = np.bincount(server_of_rows(ids.astype(np.int64), 4), minlength=4)
        assert counts.max() < 1.2 * counts.mean()
