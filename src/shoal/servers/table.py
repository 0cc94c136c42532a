"""One server's share of a sparse table: rows whose ids hash to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shoal.job.sparse_rows import SparseRows, TableSpec
from shoal.servers.holding import RefusalError


class TableShard:
    """Rows, made on first use. An update is (ids, gradients)."""

    def __init__(self, spec: TableSpec) -> None:
        self.spec = spec
        self.version = 0
        self._rows = SparseRows(spec)

    @property
    def size_bytes(self) -> int:
        """Of the rows in use, without the optimizer's state."""
        return self._rows.size_bytes

    def check(self, update: Any) -> str | None:
        """Why `update` does not fit, or None."""
        if not isinstance(update, tuple):
            return "a sparse table takes a push of rows, not of a whole tensor"
        ids, gradients = update
        reason = self.spec.wrong_ids(ids)
        if reason is None and (gradients.shape, gradients.dtype) != (
            (ids.numel(), self.spec.dim),
            self.spec.torch_dtype,
        ):
            return (
                f"got gradients of shape {tuple(gradients.shape)} {gradients.dtype} for {ids.numel()} rows, "
                f"expected {(ids.numel(), self.spec.dim)} {self.spec.torch_dtype}"
            )
        return reason

    def check_ids(self, ids: Tensor) -> None:
        """Raises RefusalError if they are no ids of this table."""
        reason = self.spec.wrong_ids(ids)
        if reason:
            raise RefusalError(reason)

    def apply(self, updates: list[Any]) -> None:
        """Sum the gradients of each row over all updates and take one step on each row that has any."""
        if len(updates) == 1:
            self._rows.apply(*updates[0])
        else:
            self._rows.apply(torch.cat([ids for ids, _ in updates]), torch.cat([rows for _, rows in updates]))
        self.version += 1

    def read(self, ids: Tensor) -> Tensor:
        """A copy of the rows, shape (n, dim)."""
        return self._rows.read(ids)

    def dump(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """A copy of all rows in use with their state."""
        return {"version": self.version}, self._rows.dump()

    def restore(self, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Take a `dump` over."""
        self._rows.restore(tensors)
        self.version = int(document["version"])
