"""An embedding too large for one machine, or of which a step touches few rows: `shoal.SparseTable`.

Unlike `nn.Embedding` it holds no parameter. A forward fetches the distinct rows of its ids, autograd gives a gradient
for each, and `step` hands those back to whoever holds the rows: parameter servers, or, when none are attached, this
process. So the same model runs in one process and on servers.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from shoal.errors import JobError
from shoal.job.sparse_rows import RowOptimizer, SparseRows, TableSpec, coalesce


class RowSource(Protocol):
    """Who holds the rows: `servers.RemoteTable`, or `LocalRows`."""

    def pull(self, ids: Tensor) -> Tensor:
        """The rows of distinct ids, shape (n, dim); the caller's own memory."""

    def push(self, ids: Tensor, gradients: Tensor) -> None:
        """One step's gradients of distinct, ascending ids. They must stay as they are until the next push."""


class LocalRows:
    """Rows in this process."""

    def __init__(self, spec: TableSpec) -> None:
        self.rows = SparseRows(spec)

    def pull(self, ids: Tensor) -> Tensor:
        return self.rows.read(ids)

    def push(self, ids: Tensor, gradients: Tensor) -> None:
        self.rows.apply(ids, gradients)


class SparseTable(nn.Module):
    """Rows by id, made on first use.

    The rows' optimizer is the table's own; the job's optimizer does not see them. After `backward`, call `step` (or
    `collect`, and push what it returns).

    Args:
        rows: ids go from 0 to rows - 1.
        dim: values a row.
        optimizer: "adagrad", "adam" (lazy) or "sgd", for each row by itself.
        lr: its learning rate.
        seed, std: rows start uniformly distributed with standard deviation `std`, as a function of seed and id alone.
        dtype: torch.float32 or torch.float64.

    Raises:
        JobError: an argument is out of range.
    """

    def __init__(
        self,
        rows: int,
        dim: int,
        *,
        optimizer: RowOptimizer = "adagrad",
        lr: float = 0.01,
        seed: int = 0,
        std: float = 0.01,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        name = str(dtype).removeprefix("torch.")
        self.spec = TableSpec(rows=rows, dim=dim, optimizer=optimizer, lr=lr, seed=seed, std=std, dtype=name)
        self._source: RowSource = LocalRows(self.spec)
        self._used: list[tuple[Tensor, Tensor]] = []

    def attach(self, source: RowSource) -> None:
        """Take rows from `source` from now on."""
        self._source = source
        self._used.clear()

    def forward(self, ids: Tensor) -> Tensor:
        """The rows of `ids`, of any shape and an integer dtype: shape (*ids.shape, dim), on the ids' device.

        Raises:
            JobError: an id is not of this table.
            ServerLostError, ServerRefusedError: from the servers, where they hold the rows.
        """
        unique, inverse = torch.unique(ids.detach().cpu().long(), return_inverse=True)
        reason = self.spec.wrong_ids(unique)
        if reason:
            raise JobError(f"SparseTable({self.spec.rows}, {self.spec.dim}): {reason}")
        rows = self._source.pull(unique)
        if torch.is_grad_enabled():
            rows.requires_grad_()
            self._used.append((unique, rows))
        return nn.functional.embedding(inverse.to(ids.device), rows.to(ids.device))

    def collect(self) -> tuple[Tensor, Tensor]:
        """Take the gradients since the last call: distinct ids, ascending, and their sums, shape (n, dim)."""
        used = [(ids, rows.grad) for ids, rows in self._used if rows.grad is not None]
        self._used.clear()
        if not used:
            spec = self.spec
            return torch.empty(0, dtype=torch.int64), torch.empty((0, spec.dim), dtype=spec.torch_dtype)
        if len(used) == 1:
            return used[0]
        return coalesce(torch.cat([ids for ids, _ in used]), torch.cat([rows for _, rows in used]))

    def step(self) -> None:
        """One step of the rows' optimizer with the gradients since the last."""
        self._source.push(*self.collect())

    def get_extra_state(self) -> Any:
        """The rows in use with their optimizer's state, when they are in this process; else nothing."""
        return self._source.rows.dump() if isinstance(self._source, LocalRows) else {}

    def set_extra_state(self, state: Any) -> None:
        """Take over what `get_extra_state` gave."""
        if state and isinstance(self._source, LocalRows):
            self._source.rows.restore(state)

    def extra_repr(self) -> str:
        return f"{self.spec.rows}, {self.spec.dim}, optimizer={self.spec.optimizer!r}, lr={self.spec.lr}"


def sparse_tables(model: nn.Module) -> list[tuple[str, SparseTable]]:
    """The tables of a model, by name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, SparseTable)]
