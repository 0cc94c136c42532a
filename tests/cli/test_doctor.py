"""The doctor: it always comes to an end, says what to do about each problem, and fails only if nothing can train."""

from __future__ import annotations

import builtins
import json
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from shoal.cli import doctor as module
from shoal.cli.container_limits import memory_limit_bytes, quota_cores
from shoal.cli.doctor import Finding, can_train, doctor, examine


def found(what: str) -> Finding:
    return next(finding for finding in examine() if finding.what == what)


def group(root: Path, path: str, **files: str) -> Path:
    folder = root / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")
    return root


def membership(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "membership"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_this_machine_which_runs_the_tests_can_train() -> None:
    assert can_train(examine())


def test_every_problem_comes_with_a_remedy() -> None:
    for finding in examine():
        assert finding.what
        assert finding.detail
        assert finding.state in ("ok", "missing", "problem")
        assert finding.remedy or finding.state != "problem"


def test_json_is_the_last_line_of_stdout_and_the_table_goes_elsewhere() -> None:
    result = CliRunner().invoke(doctor, ["--json"])
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    assert told["can_train"] is True
    assert {"area", "what", "state", "detail", "remedy"} == told["findings"][0].keys()
    assert "Python" in result.stderr


def test_the_table_names_everything_that_was_looked_at() -> None:
    result = CliRunner().invoke(doctor)
    assert result.exit_code == 0
    for what in ("Python", "torch", "CPU cores", "memory", "shared memory", "gloo", "nccl", "loopback", "CUDA"):
        assert what in result.stdout


def test_without_torch_it_says_so_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_torch(name: str, *args: object, **kwargs: object) -> object:
        if name == "torch" or name.startswith("torch."):
            raise ImportError("No module named 'torch'")
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without_torch)
    result = CliRunner().invoke(doctor)
    assert result.exit_code == 1
    assert "pip install" in result.stdout


def test_without_gloo_it_fails_and_a_missing_gpu_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    assert CliRunner().invoke(doctor).exit_code == 0
    monkeypatch.setattr(dist, "is_gloo_available", lambda: False)
    assert CliRunner().invoke(doctor).exit_code == 1


def test_a_small_shared_memory_is_a_problem_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.shutil.disk_usage

    def small(path: object) -> object:
        return type(real("/"))(64 << 20, 0, 64 << 20) if str(path) == "/dev/shm" else real(path)

    monkeypatch.setattr(module.shutil, "disk_usage", small)
    finding = found("shared memory")
    assert finding.state == "problem"
    assert "--shm-size" in finding.remedy


def test_a_quota_below_the_cores_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "quota_cores", lambda: 0.5)
    finding = found("CPU cores")
    assert finding.state == "problem"
    assert "0.5 cores" in finding.detail


def test_a_host_name_that_does_not_resolve_is_a_problem_with_the_line_to_add(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise socket.gaierror("no such name")

    monkeypatch.setattr(module.socket, "getaddrinfo", refuse)
    monkeypatch.setattr(module.socket, "gethostname", lambda: "box")
    assert "127.0.1.1 box" in found("host name").remedy


def test_limits_of_control_groups_version_2_are_the_tightest_on_the_way_up(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    group(root, "a", cpu__max="150000 100000", memory__max="2000000")
    group(root, "a/b", cpu__max="max 100000", memory__max="3000000")
    member = membership(tmp_path, "0::/a/b")
    assert quota_cores(root, member) == 1.5
    assert memory_limit_bytes(root, member) == 2_000_000


def test_limits_of_control_groups_version_1_are_read_also_where_only_the_root_is_mounted(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    group(root, "cpu", cpu__cfs_quota_us="200000", cpu__cfs_period_us="100000")
    group(root, "memory", memory__limit_in_bytes="9223372036854771712")
    member = membership(tmp_path, "2:cpu,cpuacct:/docker/abc", "3:memory:/docker/abc")
    assert quota_cores(root, member) == 2.0
    assert memory_limit_bytes(root, member) is None


def test_no_control_groups_mean_no_limit(tmp_path: Path) -> None:
    assert quota_cores(tmp_path / "none", tmp_path / "nothing") is None
    assert memory_limit_bytes(tmp_path / "none", tmp_path / "nothing") is None
