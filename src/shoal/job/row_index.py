"""Which slot a row id of a sparse table lies in: vectorised over whole batches of ids.

Two forms with one interface. `DirectIndex` is an array over all possible ids, of which the system backs only touched
pages with memory; `HashIndex` is open addressing with linear probing (Knuth 6.4, at most half full), for tables whose
id space is far larger than the rows in use.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
DIRECT_ROWS = 1 << 27
"""Up to this many possible rows a direct array is used: 512 MiB of address space at most."""


class RowIndex(Protocol):
    """Row id -> slot; slots count up from 0 in order of first use."""

    num_rows: int
    """Rows in use."""

    def find(self, ids: Ids) -> Ids:
        """The slot of each id, shape as `ids`; -1 where it has none yet."""

    def add(self, ids: Ids) -> Ids:
        """Give new ids (distinct, none of them known) the next slots in their order; returns the slots."""


def make_index(rows: int) -> RowIndex:
    """The form that suits a table of `rows` possible rows."""
    return DirectIndex(rows) if rows <= DIRECT_ROWS else HashIndex()


class DirectIndex:
    """One entry for each possible id."""

    def __init__(self, rows: int) -> None:
        self.num_rows = 0
        self._slots = np.zeros(rows, dtype=np.int32)  # slot + 1: zeros cost no memory until they are written

    def find(self, ids: Ids) -> Ids:
        return self._slots[ids].astype(np.int64) - 1

    def add(self, ids: Ids) -> Ids:
        slots = np.arange(self.num_rows, self.num_rows + len(ids))
        self._slots[ids] = slots + 1
        self.num_rows += len(ids)
        return slots


class HashIndex:
    """Open addressing: ids of any size, memory by the rows in use."""

    def __init__(self, capacity: int = 1024) -> None:
        """`capacity` is a power of 2."""
        self.num_rows = 0
        self._resize(capacity)

    def find(self, ids: Ids) -> Ids:
        places = self._home(ids)
        slots = np.full(len(ids), -1, dtype=np.int64)
        open_ = np.arange(len(ids))  # indices of ids that are still looked for
        while len(open_):
            found = self._ids[places]
            hit = found == ids[open_]
            slots[open_[hit]] = self._slots[places[hit]]
            further = ~hit & (found >= 0)
            open_, places = open_[further], (places[further] + 1) & self._mask
        return slots

    def add(self, ids: Ids) -> Ids:
        slots = np.arange(self.num_rows, self.num_rows + len(ids))
        self.num_rows += len(ids)
        if 2 * self.num_rows > len(self._ids):
            known = self._ids >= 0
            old_ids, old_slots = self._ids[known], self._slots[known]
            self._resize(1 << int(2 * self.num_rows).bit_length())
            self._insert(old_ids, old_slots)
        self._insert(ids, slots)
        return slots

    def _insert(self, ids: Ids, slots: Ids) -> None:
        places = self._home(ids)
        while len(ids):
            free = self._ids[places] < 0
            self._ids[places[free]] = ids[free]  # of several ids at one place, the last written stays
            mine = self._ids[places] == ids
            self._slots[places[mine]] = slots[mine]
            ids, slots, places = ids[~mine], slots[~mine], (places[~mine] + 1) & self._mask

    def _resize(self, capacity: int) -> None:
        self._ids = np.full(capacity, -1, dtype=np.int64)
        self._slots = np.zeros(capacity, dtype=np.int64)
        self._mask = np.int64(capacity - 1)
        self._shift = np.uint64(64 - (capacity.bit_length() - 1))

    def _home(self, ids: Ids) -> Ids:
        with np.errstate(over="ignore"):
            return ((ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> self._shift).astype(np.int64)
