"""What all tests share: one thread a process, the same random examples every time, and no process left behind."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in every worker that a test starts

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import psutil
import pytest
import torch

hypothesis.settings.register_profile("same-every-time", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("same-every-time")
torch.set_num_threads(1)

JOBS = Path(__file__).parent / "jobs"


@pytest.fixture(autouse=True)
def _no_process_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """A process that names the test's folder on its command line belongs to the test."""
    folder = str(request.getfixturevalue("tmp_path")) if "tmp_path" in request.fixturenames else None
    yield
    if folder is not None:
        left = [p for p in psutil.process_iter(["cmdline"]) if any(folder in word for word in p.info["cmdline"] or [])]
        for process in left:
            process.kill()
        assert not left, f"still running: {left}"


@pytest.fixture
def jobs() -> Path:
    """The folder of the jobs that tests train."""
    return JOBS
