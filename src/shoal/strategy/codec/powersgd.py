"""PowerSGD: each parameter's gradient, as a matrix, is sent as two thin ones (Vogels et al. 2019).

M, shape (m, n), becomes P = M Q, summed over the ranks and orthogonalised, then Q = M^T P, summed: two rounds, and
P Q^T is the sum's projection on the rank-r subspace that one step of power iteration finds. Q is kept as the next
step's start, so that the subspace follows the gradients. Vectors, and matrices too small to win, ride along
uncompressed.
Products are in fp32 (fp64 for fp64 values).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import pydantic
import torch
from torch import Tensor

from shoal.strategy.bucket import Piece
from shoal.strategy.codec.base import CodecOptions, Projection
from shoal.strategy.codec.chunks import working_dtype
from shoal.strategy.codec.draw import uniform

_Q = "q"


@dataclass(frozen=True, kw_only=True)
class PowerSgdConfig(CodecOptions):
    """`[codec] kind = "powersgd"`.

    Attributes:
        rank: columns of P and Q; exact for matrices of at most this rank.
    """

    kind: Literal["powersgd"] = "powersgd"
    rank: Annotated[int, pydantic.Field(ge=1, le=256)] = 4


@dataclass(frozen=True)
class _Matrix:
    """A parameter's matrix, shape (rows, columns), whose values begin at `offset`."""

    offset: int
    rows: int
    columns: int

    def of(self, flat: Tensor) -> Tensor:
        return flat[self.offset : self.offset + self.rows * self.columns].view(self.rows, self.columns)


class PowerSgdCodec:
    """r (m + n) values for a matrix of m n."""

    linear: ClassVar[bool] = True
    biased: ClassVar[bool] = True

    def __init__(self, config: PowerSgdConfig) -> None:
        self._rank = config.rank

    def project(self, values: Tensor, pieces: Sequence[Piece], memory: dict[str, Tensor], key: int) -> Projection:
        """Sum P and everything uncompressed, then Q."""
        flat = values.to(working_dtype(values.dtype))
        matrices, gaps = self._lay_out(pieces, flat.numel())
        thin = [flat[gap] for gap in gaps]
        num_p = sum(m.rows for m in matrices) * self._rank
        first = flat.new_empty(num_p + sum(t.numel() for t in thin))
        q = memory.get(_Q)
        if q is None:
            q = self._start(matrices, key, flat)
        for m, p_m, q_m in self._views(matrices, first, q):
            torch.mm(m.of(flat), _levelled(q_m), out=p_m)
        torch.cat([first[:0], *thin], out=first[num_p:])
        yield first
        self._orthogonalise(matrices, first)
        own_q = torch.empty_like(q)
        for m, p_m, q_m in self._views(matrices, first, own_q):
            torch.mm(m.of(flat).t(), p_m, out=q_m)
        total_q = own_q.clone()
        yield total_q
        memory[_Q] = total_q
        total, own = flat.clone(), flat.clone()
        for m, p_m, q_m in self._views(matrices, first, total_q):
            torch.mm(p_m, q_m.t(), out=m.of(total))
        for m, p_m, q_m in self._views(matrices, first, own_q):
            torch.mm(p_m, q_m.t(), out=m.of(own))
        for gap, summed in zip(gaps, first[num_p:].split([t.numel() for t in thin]), strict=True):
            total[gap] = summed
        return total.to(values.dtype), own.to(values.dtype)

    def encode(self, values: Tensor, key: int) -> Tensor:
        """From point to point: a row as one nearly square matrix, after one more step of power iteration.

        P, then Q; or the values as they are, where that is not more.
        """
        rows, n = values.shape
        height, width, wins = self._square(n)
        if not wins or rows == 0:
            return values.contiguous().view(torch.uint8)
        padded = torch.nn.functional.pad(values, (0, height * width - n)).to(working_dtype(values.dtype))
        m = padded.view(rows, height, width)
        q = uniform(key, torch.Size([1, width, self._rank]), m).sub_(0.5).expand(rows, -1, -1)
        for _ in range(2):
            p = torch.linalg.qr(m @ _levelled(q))[0]
            q = m.mT @ p
        thin = torch.cat([p.flatten(1), q.flatten(1)], dim=1)
        return thin.to(values.dtype).view(torch.uint8)

    def decode(self, payload: Tensor, num_values: int, like: Tensor) -> Tensor:
        """P Q^T, shape (rows, n)."""
        rows = len(payload)
        if rows * num_values == 0:
            return like.new_empty((rows, num_values))
        height, width, wins = self._square(num_values)
        thin = payload.view(like.dtype)
        if not wins:
            return thin
        p, q = thin.to(working_dtype(like.dtype)).split([height * self._rank, width * self._rank], dim=1)
        product = p.view(rows, height, -1) @ q.view(rows, width, -1).mT
        decoded: Tensor = product.view(rows, -1)[:, :num_values].to(like.dtype)
        return decoded

    def size_bytes(self, num_values: int, item_bytes: int) -> int:
        """Of a row's P and Q from point to point, in the values' own size."""
        height, width, wins = self._square(num_values)
        return item_bytes * (self._rank * (height + width) if wins else num_values)

    def _lay_out(self, pieces: Sequence[Piece], num_values: int) -> tuple[list[_Matrix], list[slice]]:
        """The matrices to compress, those of one shape side by side, and what lies between them in the bucket."""
        matrices, gaps, end = [], [], 0
        for piece in pieces:
            if len(piece.shape) < 2 or 0 in piece.shape:
                continue
            rows, columns = piece.shape[0], math.prod(piece.shape[1:])
            if self._rank * (rows + columns) >= rows * columns:
                continue
            gaps.append(slice(end, piece.offset))
            matrices.append(_Matrix(piece.offset, rows, columns))
            end = piece.offset + rows * columns
        gaps.append(slice(end, num_values))
        return sorted(matrices, key=lambda m: (m.rows, m.columns)), [g for g in gaps if g.start < g.stop]

    def _start(self, matrices: list[_Matrix], key: int, like: Tensor) -> Tensor:
        return uniform(key, torch.Size([self._rank * sum(m.columns for m in matrices)]), like).sub_(0.5)

    def _views(self, matrices: list[_Matrix], p: Tensor, q: Tensor) -> Iterator[tuple[_Matrix, Tensor, Tensor]]:
        """Each matrix with its P, shape (rows, r), and its Q, shape (columns, r), in flat memory."""
        p_at = q_at = 0
        for m in matrices:
            p_end, q_end = p_at + m.rows * self._rank, q_at + m.columns * self._rank
            yield m, p[p_at:p_end].view(m.rows, self._rank), q[q_at:q_end].view(m.columns, self._rank)
            p_at, q_at = p_end, q_end

    def _orthogonalise(self, matrices: list[_Matrix], p: Tensor) -> None:
        """Make the columns of each P orthonormal, in place; those of one height at once."""
        at = 0
        for height in sorted({m.rows for m in matrices}):
            count = sum(m.rows == height for m in matrices)
            block = p[at : at + count * height * self._rank].view(count, height, self._rank)
            block.copy_(torch.linalg.qr(block)[0])
            at += block.numel()

    def _square(self, num_values: int) -> tuple[int, int, bool]:
        """(height, width) of the nearly square matrix that holds so many values, and whether compressing it wins."""
        height = max(1, math.isqrt(num_values))
        width = -(-num_values // height)
        return height, width, self._rank * (height + width) < num_values


def _levelled(q: Tensor) -> Tensor:
    """Scale each column, shape (..., n, r), to a largest magnitude of 1: products neither overflow nor vanish."""
    largest = q.abs().amax(dim=-2, keepdim=True)
    return q / largest.clamp_(min=torch.finfo(q.dtype).tiny)
