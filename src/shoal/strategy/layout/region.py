"""Which values of a whole parameter one rank holds: said without any layout, so that any other can find them.

A region is some ranges of rows (of the first dimension) and one range of columns (of the second); further dimensions
are whole. Tensor parallelism takes columns, or rows in as many ranges as matrices are fused into one; sharding takes a
range of the rows that are left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

Range = tuple[int, int]


@dataclass(frozen=True)
class Region:
    """A part of a parameter of shape `shape`.

    Attributes:
        rows: ranges of the first dimension, one after another; of a scalar: (0, 1), or none.
        columns: a range of the second; None: all.
    """

    shape: tuple[int, ...]
    rows: tuple[Range, ...]
    columns: Range | None = None

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Self:
        """All of it."""
        return cls(tuple(shape), ((0, shape[0] if shape else 1),))

    @property
    def num_rows(self) -> int:
        """Rows in all."""
        return sum(stop - start for start, stop in self.rows)

    @property
    def is_whole(self) -> bool:
        """Whether nothing is left out."""
        return self == Region.whole(self.shape)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of the part."""
        if not self.shape:
            return ()
        rest = list(self.shape[1:])
        if self.columns is not None:
            rest[0] = self.columns[1] - self.columns[0]
        return (self.num_rows, *rest)

    def of_rows(self, index: int, count: int) -> Region:
        """The `index`-th of `count` chunks of the rows, as `torch.chunk` cuts them; the last ones may be empty."""
        size = -(-self.num_rows // count)
        return Region(self.shape, _cut(self.rows, index * size, (index + 1) * size), self.columns)

    def of_fused_rows(self, index: int, count: int, parts: int) -> Region:
        """The `index`-th of `count` equal chunks of each of `parts` equal stacked blocks of rows; of a whole one."""
        block = self.shape[0] // parts
        chunk = block // count
        starts = [part * block + index * chunk for part in range(parts)]
        return Region(self.shape, tuple((start, start + chunk) for start in starts), self.columns)

    def of_columns(self, index: int, count: int) -> Region:
        """The `index`-th of `count` equal chunks of the columns."""
        size = self.shape[1] // count
        return Region(self.shape, self.rows, (index * size, (index + 1) * size))

    def take(self, whole: Tensor) -> Tensor:
        """This part of the whole, a copy."""
        if not self.shape:
            return whole.clone()
        if not self.num_rows:
            return whole.new_empty(self.local_shape)
        taken = torch.cat([whole[start:stop] for start, stop in self.rows])
        return taken if self.columns is None else taken[:, self.columns[0] : self.columns[1]].contiguous()

    def put(self, part: Tensor, whole: Tensor) -> None:
        """Write this part into the whole."""
        if not self.shape:
            whole.copy_(part)
            return
        done = 0
        for start, stop in self.rows:
            target = whole[start:stop]
            if self.columns is not None:
                target = target[:, self.columns[0] : self.columns[1]]
            target.copy_(part[done : done + stop - start])
            done += stop - start

    def to_plain(self) -> dict[str, Any]:
        """As JSON."""
        return {"shape": list(self.shape), "rows": [list(r) for r in self.rows], "columns": self.columns}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Self:
        """The inverse of `to_plain`."""
        columns = plain["columns"]
        return cls(
            tuple(plain["shape"]),
            tuple((int(start), int(stop)) for start, stop in plain["rows"]),
            None if columns is None else (int(columns[0]), int(columns[1])),
        )

    @property
    def num_values(self) -> int:
        """Values in the part."""
        return math.prod(self.local_shape)


def _cut(ranges: Sequence[Range], start: int, stop: int) -> tuple[Range, ...]:
    """The part of concatenated ranges between two places of the concatenation."""
    found, before = [], 0
    for low, high in ranges:
        first, last = max(start - before, 0), min(stop - before, high - low)
        if first < last:
            found.append((low + first, low + last))
        before += high - low
    return tuple(found)
