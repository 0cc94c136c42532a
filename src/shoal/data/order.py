"""Which sample comes when: a pure function of (seed, epoch, position), never of ranks or workers.

The shuffle is a keyed permutation computed for any position on its own (a Feistel network with cycle walking: Black and
Rogaway 2002, "Ciphers with arbitrary finite domains"), so it takes no memory whatever the size of the data, and a run
resumes at any position at once.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6
_MIX = np.array([0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB], dtype=np.uint64)  # splitmix64's constants


def shuffled(positions: NDArray[np.int64], size: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the dataset index that stands at each position of an epoch.

    Args:
        positions: shape (n,), each in 0 .. size - 1.
        size: the number of samples in the dataset.
        seed, epoch: each pair gives a permutation of its own.

    Returns:
        Indices, shape (n,). Over all positions each index occurs exactly once.
    """
    half_bits = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    keys = _round_keys(seed, epoch)
    values = _feistel(positions.astype(np.uint64), half_bits, keys)
    while True:  # walk the cycle until inside; the domain is at most 4 times too large, so this ends soon
        outside = values >= size
        if not outside.any():
            return values.astype(np.int64)
        values[outside] = _feistel(values[outside], half_bits, keys)


def sample_seeds(positions: NDArray[np.int64], *, seed: int, epoch: int) -> NDArray[np.uint64]:
    """Return a 64-bit random seed for each position of an epoch, for whatever a dataset draws at random."""
    key = _mix(_mix(np.array([_word(seed)])) + _word(epoch))  # (1,)
    return _mix(positions.astype(np.uint64) + key)


def _round_keys(seed: int, epoch: int) -> NDArray[np.uint64]:
    rounds = np.arange(1, _ROUNDS + 1, dtype=np.uint64)
    return _mix(_mix(_mix(rounds + _word(seed)) + _word(epoch)))


def _feistel(values: NDArray[np.uint64], half_bits: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << shift) | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finalizer (Steele et al. 2014): every input bit reaches every output bit."""
    values = values + _MIX[0]
    values = (values ^ (values >> np.uint64(30))) * _MIX[1]
    values = (values ^ (values >> np.uint64(27))) * _MIX[2]
    mixed: NDArray[np.uint64] = values ^ (values >> np.uint64(31))
    return mixed


def _word(value: int) -> np.uint64:
    return np.uint64(value & 0xFFFFFFFFFFFFFFFF)
