"""The rows of a sparse table in memory: made on first use, each with its own optimizer state.

A row's first values are a function of (seed, id, column) alone, so it does not matter who touches which row first, nor
on which server. Optimizers work on the rows of a batch at once:

* `sgd`: value -= lr * gradient
* `adagrad` (Duchi et al. 2011): a sum of squares for each value, as `torch.optim.Adagrad`
* `adam` (Kingma and Ba 2015), the lazy form: moments move, and steps are counted, only for rows with a gradient
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoal.errors import JobError
from shoal.job.row_index import make_index

RowOptimizer = Literal["sgd", "adagrad", "adam"]
_STATES: dict[str, tuple[str, ...]] = {"sgd": (), "adagrad": ("sum",), "adam": ("exp_avg", "exp_avg_sq")}
_DTYPES = {"float32": torch.float32, "float64": torch.float64}
_EPS = {"sgd": 0.0, "adagrad": 1e-10, "adam": 1e-8}
_BETAS = (0.9, 0.999)
_MIN_CAPACITY = 1024


@dataclass(frozen=True, kw_only=True)
class TableSpec:
    """What a table is.

    Attributes:
        rows: ids go from 0 to rows - 1.
        dim: values a row.
        optimizer, lr: how a row is updated; `lr` > 0.
        seed, std: rows start uniformly distributed around 0 with standard deviation `std`.
        dtype: "float32" or "float64".
    """

    rows: int
    dim: int
    optimizer: RowOptimizer = "adagrad"
    lr: float = 0.01
    seed: int = 0
    std: float = 0.01
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.rows < 1 or self.dim < 1:
            raise JobError(f"SparseTable: got {self.rows} rows of {self.dim} values, expected at least 1 of each")
        if self.optimizer not in _STATES:
            raise JobError(f"SparseTable: got optimizer {self.optimizer!r}, expected one of {', '.join(_STATES)}")
        if self.dtype not in _DTYPES:
            raise JobError(f"SparseTable: got dtype {self.dtype!r}, expected one of {', '.join(_DTYPES)}")
        if not self.lr > 0:
            raise JobError(f"SparseTable: got lr {self.lr}, expected more than 0")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of values and gradients."""
        return _DTYPES[self.dtype]

    def document(self) -> dict[str, Any]:
        """As JSON; `TableSpec(**document)` reads it."""
        return asdict(self)

    def wrong_ids(self, ids: Tensor) -> str | None:
        """Why `ids` are no ids of this table, or None."""
        if ids.dtype != torch.int64 or ids.dim() != 1:
            return f"got ids of shape {tuple(ids.shape)} {ids.dtype}, expected one dim of int64"
        if ids.numel() == 0:
            return None
        low, high = (int(bound) for bound in torch.aminmax(ids))
        if low >= 0 and high < self.rows:
            return None
        return f"got row id {low if low < 0 else high}, expected 0 to {self.rows - 1}"


class SparseRows:
    """The rows in use. Memory grows by half as much again when it is full."""

    def __init__(self, spec: TableSpec) -> None:
        self.spec = spec
        self._index = make_index(spec.rows)
        self._ids = np.empty(0, dtype=np.int64)  # slot -> id
        self._values = torch.empty((0, spec.dim), dtype=spec.torch_dtype)
        self._states = {name: torch.empty((0, spec.dim), dtype=spec.torch_dtype) for name in _STATES[spec.optimizer]}
        self._steps = torch.empty(0, dtype=torch.int64)

    @property
    def num_rows(self) -> int:
        """Rows in use."""
        return self._index.num_rows

    @property
    def size_bytes(self) -> int:
        """Of the values in use."""
        return self.num_rows * self.spec.dim * self._values.element_size()

    def read(self, ids: Tensor) -> Tensor:
        """A copy of the rows of `ids`, shape (n, dim); rows not used before are made. `ids` are not checked."""
        slots = self._slots(ids)  # first: it may move the values
        return self._values.index_select(0, slots)

    def apply(self, ids: Tensor, gradients: Tensor) -> None:
        """One step on the rows of `ids`, shape (n,), with `gradients`, shape (n, dim), summed over repeated ids."""
        if ids.numel() == 0:
            return
        if ids.numel() > 1 and not bool((ids[1:] > ids[:-1]).all()):
            ids, gradients = coalesce(ids, gradients)
        slots = self._slots(ids)
        step = {"sgd": self._sgd, "adagrad": self._adagrad, "adam": self._adam}[self.spec.optimizer]
        step(slots, gradients)

    def dump(self) -> dict[str, Tensor]:
        """A copy of all rows in use with their state, by name; `ids` has shape (num_rows,)."""
        n = self.num_rows
        tensors = {"ids": torch.from_numpy(self._ids[:n].copy()), "value": self._values[:n].clone()}
        tensors |= {f"optimizer/{name}": state[:n].clone() for name, state in self._states.items()}
        return tensors | ({"optimizer/steps": self._steps[:n].clone()} if self.spec.optimizer == "adam" else {})

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take a `dump` over, in place of what was here."""
        self.__init__(self.spec)  # type: ignore[misc]
        ids = tensors["ids"].numpy()
        n = len(ids)
        self._reserve(n)
        self._ids[:n] = ids
        self._index.add(self._ids[:n])
        self._values[:n] = tensors["value"]
        for name, state in self._states.items():
            state[:n] = tensors[f"optimizer/{name}"]
        if "optimizer/steps" in tensors:
            self._steps[:n] = tensors["optimizer/steps"]

    def _sgd(self, slots: Tensor, gradients: Tensor) -> None:
        self._values.index_add_(0, slots, gradients, alpha=-self.spec.lr)

    def _adagrad(self, slots: Tensor, gradients: Tensor) -> None:
        total = self._states["sum"].index_select(0, slots)
        total.addcmul_(gradients, gradients)
        self._states["sum"].index_copy_(0, slots, total)
        step = torch.div(gradients, total.sqrt_().add_(_EPS["adagrad"]), out=total)
        self._values.index_add_(0, slots, step, alpha=-self.spec.lr)

    def _adam(self, slots: Tensor, gradients: Tensor) -> None:
        beta1, beta2 = _BETAS
        first = self._states["exp_avg"].index_select(0, slots).lerp_(gradients, 1 - beta1)
        second = self._states["exp_avg_sq"].index_select(0, slots).mul_(beta2)
        second.addcmul_(gradients, gradients, value=1 - beta2)
        steps = self._steps.index_select(0, slots) + 1
        self._states["exp_avg"].index_copy_(0, slots, first)
        self._states["exp_avg_sq"].index_copy_(0, slots, second)
        self._steps.index_copy_(0, slots, steps)
        count = steps.to(gradients.dtype).unsqueeze(1)  # (n, 1)
        denominator = (second / (1 - beta2**count)).sqrt_().add_(_EPS["adam"])
        self._values.index_add_(0, slots, first / (1 - beta1**count) / denominator, alpha=-self.spec.lr)

    def _slots(self, ids: Tensor) -> Tensor:
        wanted = ids.numpy()
        slots = self._index.find(wanted)
        if len(slots) and slots.min() < 0:
            new = np.unique(wanted[slots < 0])
            self._reserve(self.num_rows + len(new))
            places = self._index.add(new)
            self._ids[places] = new
            self._values[places[0] : places[-1] + 1] = initial_rows(self.spec, new)
            slots = self._index.find(wanted)
        return torch.from_numpy(slots)

    def _reserve(self, num_rows: int) -> None:
        """Make room. New state is zero."""
        capacity = len(self._ids)
        if num_rows <= capacity:
            return
        capacity = min(max(num_rows, capacity + capacity // 2, _MIN_CAPACITY), max(self.spec.rows, num_rows))
        self._ids = np.concatenate([self._ids, np.empty(capacity - len(self._ids), dtype=np.int64)])
        self._values = _grown(self._values, capacity)
        self._states = {name: _grown(state, capacity) for name, state in self._states.items()}
        if self.spec.optimizer == "adam":
            self._steps = _grown(self._steps, capacity)


def coalesce(ids: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct ids, ascending, and the sum of each one's gradients."""
    unique, inverse = torch.unique(ids, return_inverse=True)
    summed = torch.zeros((unique.numel(), gradients.shape[1]), dtype=gradients.dtype)
    return unique, summed.index_add_(0, inverse, gradients)


def initial_rows(spec: TableSpec, ids: NDArray[np.int64]) -> Tensor:
    """The first values of rows, shape (n, dim): SplitMix64 (Steele et al. 2014) of seed, id and column."""
    with np.errstate(over="ignore"):
        columns = np.arange(spec.dim, dtype=np.uint64)
        # (n, dim): each value's own place in one long sequence
        z = ids.astype(np.uint64)[:, None] * np.uint64(spec.dim) + columns
        z = (z + np.uint64(spec.seed * 2 + 1) * np.uint64(0xD1342543DE82EF95)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    uniform = (z >> np.uint64(11)).astype(np.float64) * 2.0**-53  # [0, 1)
    scale = spec.std * math.sqrt(12.0)
    return torch.from_numpy((uniform - 0.5) * scale).to(spec.torch_dtype)


def _grown(tensor: Tensor, capacity: int) -> Tensor:
    larger = torch.zeros((capacity, *tensor.shape[1:]), dtype=tensor.dtype)
    larger[: len(tensor)] = tensor
    return larger
