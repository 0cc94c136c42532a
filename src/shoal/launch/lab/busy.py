"""Spin, and print how many cores' worth of CPU time that took: run inside a control group to see its quota.

A program of its own, run by its path and importing nothing of Shoal, so that it starts in a few milliseconds even
under a small quota. Arguments: seconds to spin, number of processes that spin.
"""

from __future__ import annotations

import os
import resource
import sys
import time


def spin(duration_s: float) -> None:
    """Use as much CPU time as there is for `duration_s` seconds."""
    end = time.perf_counter() + duration_s
    while time.perf_counter() < end:
        pass


def cores_used(duration_s: float, num_processes: int) -> float:
    """Fork processes that spin side by side and return their CPU time divided by the time that passed."""
    begin = time.perf_counter()
    for _ in range(num_processes):
        if os.fork() == 0:
            spin(duration_s)
            os._exit(0)
    for _ in range(num_processes):
        os.wait()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (used.ru_utime + used.ru_stime) / (time.perf_counter() - begin)


if __name__ == "__main__":
    print(cores_used(float(sys.argv[1]), int(sys.argv[2])))
