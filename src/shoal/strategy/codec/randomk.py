"""Random-k: one value at random of every group, the same on all ranks, so that what is kept may be summed as it is.

Stich et al. 2018, with one draw a group rather than k of all: as good in expectation, E|x - kept|**2 = (1 - 1/g) |x|**2
for groups of g, and it costs no permutation. The choice is a pure function of the key, which a message carries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import pydantic
import torch
from torch import Tensor

from shoal.strategy.bucket import Piece
from shoal.strategy.codec.base import CodecOptions, Projection
from shoal.strategy.codec.chunks import chunk_sizes, chunked
from shoal.strategy.codec.draw import DRAW_BITS, draw
from shoal.strategy.codec.packing import section

_KEY_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class RandomKConfig(CodecOptions):
    """`[codec] kind = "randomk"`.

    Attributes:
        ratio: the part of the values that is sent: one of every 1 / ratio, rounded to a whole number.
    """

    kind: Literal["randomk"] = "randomk"
    ratio: Annotated[float, pydantic.Field(gt=0, le=1)] = 0.0625


class RandomKCodec:
    """A group's one value, in full precision. Without error feedback it is scaled by the group's size: no bias then."""

    linear: ClassVar[bool] = True
    biased: ClassVar[bool] = True

    def __init__(self, config: RandomKConfig) -> None:
        self._group = max(1, round(1 / config.ratio))
        self._scaled = config.error_feedback is False

    def encode(self, values: Tensor, key: int) -> Tensor:
        """The key, 8 bytes, then the values kept, as they are."""
        rows, n = values.shape
        if rows == 0:
            return values.new_empty((0, self.size_bytes(n, values.element_size())), dtype=torch.uint8)
        keys = torch.full((rows, 1), key, dtype=torch.int64, device=values.device)
        if n == 0:
            return keys.view(torch.uint8)
        kept = self._keep(values, self._places(keys, n))
        return torch.cat([keys.view(torch.uint8), kept.view(torch.uint8)], dim=1)

    def decode(self, payload: Tensor, num_values: int, like: Tensor) -> Tensor:
        """Zeros but where a value was kept, shape (rows, n)."""
        rows = len(payload)
        if rows * num_values == 0:
            return like.new_empty((rows, num_values))
        keys = section(payload, 0, _KEY_BYTES, torch.int64)
        kept = section(payload, _KEY_BYTES, None, like.dtype)
        return self._spread(kept, self._places(keys, num_values), num_values)

    def size_bytes(self, num_values: int, item_bytes: int) -> int:
        """One value of each group begun, and the key."""
        return _KEY_BYTES + -(-num_values // self._group) * item_bytes

    def project(self, values: Tensor, pieces: Sequence[Piece], memory: dict[str, Tensor], key: int) -> Projection:
        """Sum what is kept, in one round."""
        n = values.numel()
        if n == 0:
            return values.clone(), values
        places = self._places(torch.full((1, 1), key, dtype=torch.int64, device=values.device), n)
        kept = self._keep(values.view(1, -1), places)
        own = self._spread(kept, places, n)
        yield kept
        return self._spread(kept, places, n)[0], own[0]

    def _places(self, keys: Tensor, num_values: int) -> Tensor:
        """Where in its group each kept value lies: int64, shape (rows, groups, 1), from keys, shape (rows, 1)."""
        sizes = chunk_sizes(num_values, self._group, keys)  # the last group may be smaller
        drawn = draw(keys, len(sizes)).long().unsqueeze(-1)  # (rows, groups, 1)
        return drawn.mul_(sizes.long()).bitwise_right_shift_(DRAW_BITS)

    def _keep(self, values: Tensor, places: Tensor) -> Tensor:
        """The values at `places`, shape (rows, groups); NaN where any of a group is not finite, lest it be hidden."""
        groups = chunked(values, self._group)
        alarm = groups.abs().amax(dim=-1).mul_(0)  # 0 or NaN
        return groups.gather(-1, places).squeeze(-1).add_(alarm)

    def _spread(self, kept: Tensor, places: Tensor, num_values: int) -> Tensor:
        rows, num_groups, _ = places.shape
        values = kept.new_zeros((rows, num_groups, self._group)).scatter_(-1, places, kept.unsqueeze(-1))
        if self._scaled:
            values.mul_(chunk_sizes(num_values, self._group, values))
        return values.view(rows, -1)[:, :num_values]
