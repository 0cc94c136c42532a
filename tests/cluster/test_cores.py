"""The cores that may be used are the fewest that affinity, the group or any group around it allow."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shoal.cluster.cores import cores, quota_cores, threads


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root / "groups"


def member(root: Path, *lines: str) -> Path:
    path = root / "membership"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("own", "parent", "expected"),
    [
        ("50000 100000", "max 100000", 0.5),
        ("max 100000", "350000 100000", 3.5),
        ("300000 100000", "200000 100000", 2.0),
        ("max 100000", "max 100000", 8.0),
        ("1600000 100000", "max 100000", 8.0),
    ],
)
def test_version_2_the_tightest_group_on_the_way_up_counts(
    tmp_path: Path, own: str, parent: str, expected: float
) -> None:
    root = tree(tmp_path, {"pods/cpu.max": parent, "pods/one/cpu.max": own, "pods/other/cpu.max": "1000 100000"})
    assert cores(root, member(tmp_path, "0::/pods/one")) == expected


@pytest.mark.parametrize(
    ("own_us", "parent_us", "expected"), [("150000", "-1", 1.5), ("-1", "250000", 2.5), ("-1", "-1", 8.0)]
)
def test_version_1_the_tightest_group_on_the_way_up_counts(
    tmp_path: Path, own_us: str, parent_us: str, expected: float
) -> None:
    files = {
        "cpu/docker/cpu.cfs_quota_us": parent_us,
        "cpu/docker/cpu.cfs_period_us": "100000",
        "cpu/docker/abc/cpu.cfs_quota_us": own_us,
        "cpu/docker/abc/cpu.cfs_period_us": "100000",
        "cpu/other/cpu.cfs_quota_us": "1000",
        "cpu/other/cpu.cfs_period_us": "100000",
    }
    root = tree(tmp_path, files)
    assert cores(root, member(tmp_path, "5:memory:/other", "4:cpu,cpuacct:/docker/abc", "0::/")) == expected


def test_where_a_container_sees_only_its_own_group_as_the_root_that_counts(tmp_path: Path) -> None:
    root = tree(tmp_path, {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"})
    assert cores(root, member(tmp_path, "4:cpu,cpuacct:/docker/host-only")) == 2.0
    root = tree(tmp_path / "two", {"cpu.max": "125000 100000"})
    assert cores(root, member(tmp_path, "0::/../elsewhere")) == 1.25


@pytest.mark.parametrize("text", ["", "max", "nonsense 100000", "100000", "0 0 0"])
def test_a_file_that_says_nothing_sensible_is_no_limit(tmp_path: Path, text: str) -> None:
    assert quota_cores(tree(tmp_path, {"cpu.max": text}), member(tmp_path, "0::/")) is None


def test_without_control_groups_affinity_counts_and_without_that_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cores(tmp_path / "none", tmp_path / "nothing") == 8.0
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert cores(tmp_path / "none", tmp_path / "nothing") == 3.0
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores(tmp_path / "none", tmp_path / "nothing") == 1.0


def test_this_process_may_use_some_cores() -> None:
    assert 0 < cores() <= 8


@pytest.mark.parametrize(
    ("usable", "ranks", "expected"),
    [(8.0, 1, 8), (8.0, 2, 4), (8.0, 3, 2), (2.0, 4, 1), (0.5, 1, 1), (1.9, 1, 1), (3.0, 2, 1), (6.0, 2, 3)],
)
def test_ranks_share_whole_cores_and_each_has_at_least_one_thread(usable: float, ranks: int, expected: int) -> None:
    assert threads(usable, ranks) == expected
