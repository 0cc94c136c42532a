"""Threads are as many as the cores that this process may use, unless somebody says otherwise."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from shoal.engine import build
from shoal.plan.schema import ComputeConfig
from shoal.strategy.topology import Topology


@pytest.fixture(autouse=True)
def four_cores_by_quota(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever the machine has."""
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(build, "cores", lambda: 4.0)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("nodes", "expected"), [("a", 4), ("aab", 2), ("aaa", 1), ("aaaaaa", 1), ("ab", 4)])
def test_the_quota_is_divided_among_the_ranks_of_a_node(nodes: str, expected: int) -> None:
    build.set_threads(ComputeConfig(), Topology(0, tuple(nodes)))
    assert torch.get_num_threads() == expected


def test_a_plan_that_names_threads_comes_before_all_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    build.set_threads(ComputeConfig(threads=3), Topology(0, ("a",)))
    assert torch.get_num_threads() == 3


def test_the_environment_comes_before_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    build.set_threads(ComputeConfig(), Topology(0, ("a",)))
    assert torch.get_num_threads() == 2
