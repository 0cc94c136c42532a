"""The random generators of one rank (torch, Python, NumPy, the GPU's) as plain JSON, to save and to restore."""

from __future__ import annotations

import base64
import random
from typing import Any

import numpy as np
import torch


def seed_all(seed: int, rank: int) -> None:
    """Start every generator: ranks get streams of their own (dropout must differ between them)."""
    mixed = int(np.random.SeedSequence([seed, rank]).generate_state(1, np.uint64)[0])
    torch.manual_seed(mixed)
    random.seed(mixed)
    np.random.seed(mixed & 0xFFFFFFFF)


def capture(device: torch.device) -> dict[str, Any]:
    """The state of all generators that this rank draws from."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "torch": _pack(torch.get_rng_state()),
        "python": [version, list(words), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
    }
    if device.type == "cuda":
        state["cuda"] = _pack(torch.cuda.get_rng_state(device))
    return state


def restore(state: dict[str, Any], device: torch.device) -> None:
    """Set all generators to what `capture` saw."""
    torch.set_rng_state(_unpack(state["torch"]))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(_unpack(state["cuda"]), device)


def _pack(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _unpack(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
