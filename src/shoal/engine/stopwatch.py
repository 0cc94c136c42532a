"""Times forward and backward. A GPU's by its own clock: the CPU only queues the work, and is done long before."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """One span at a time."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self._on_gpu else []
        self._times = [0.0, 0.0]

    def start(self) -> None:
        """The work begins with what is queued from now on."""
        self._mark(0)

    def stop(self) -> None:
        """The work ends with what was queued so far."""
        self._mark(1)

    def seconds(self) -> float:
        """How long the work took; on a GPU it is waited for."""
        if not self._on_gpu:
            return self._times[1] - self._times[0]
        started, ended = self._events
        ended.synchronize()
        return float(started.elapsed_time(ended)) / 1e3

    def _mark(self, index: int) -> None:
        self._times[index] = time.perf_counter()
        if self._on_gpu:
            self._events[index].record()
