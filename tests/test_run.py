"""A run directory is made once, opened again only on request, and its files are replaced whole or not at all."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from shoal.errors import RunError
from shoal.run import Run, open_run, write_atomic


def folders(run: Run) -> set[str]:
    return {path.name for path in run.path.iterdir()}


def test_a_new_run_has_its_folders_and_nothing_else(tmp_path: Path) -> None:
    run = open_run(tmp_path / "deep" / "run", "job", resume=False)
    assert folders(run) == {"events", "logs", "checkpoints"}
    assert [path for path in run.path.rglob("*") if path.is_file()] == []


def test_a_run_without_a_name_is_called_after_its_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = open_run(None, "charlm", resume=False)
    assert run.path.parent == tmp_path / "runs"
    assert run.path.name.startswith("charlm-")


def test_two_runs_of_one_second_get_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda _: "20260102-030405")
    names = [open_run(None, "job", resume=False).path.name for _ in range(3)]
    assert names == ["job-20260102-030405", "job-20260102-030405-2", "job-20260102-030405-3"]


def test_an_existing_run_is_opened_only_to_resume(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", "job", resume=False)
    run.write_info({"job": "a.py:job", "arguments": {"width": 3}})
    with pytest.raises(RunError, match="holds a run already: add --resume"):
        open_run(tmp_path / "run", "job", resume=False)
    again = open_run(tmp_path / "run", "job", resume=True)
    assert again.read_info() == {"job": "a.py:job", "arguments": {"width": 3}}


def test_there_must_be_a_run_to_resume(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run to resume"):
        open_run(tmp_path / "none", "job", resume=True)
    with pytest.raises(RunError, match="--resume needs to know which run: add --run DIR"):
        open_run(None, "job", resume=True)
    assert not (tmp_path / "none").exists()


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match="not an empty directory: name another --run"):
        open_run(tmp_path, "job", resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_empty_folder_will_do(tmp_path: Path) -> None:
    assert folders(open_run(tmp_path, "job", resume=False)) == {"events", "logs", "checkpoints"}


@pytest.mark.parametrize("inside", ["", "deeper"])
def test_a_file_in_the_way_is_named(tmp_path: Path, inside: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file"):
        open_run(tmp_path / "file" / inside, "job", resume=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", r"run\.json is damaged"), ("[]", "holds list, expected an object"), ("", r"run\.json is damaged")],
)
def test_a_damaged_description_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(RunError, match=message):
        Run(tmp_path).read_info()


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"not a run directory: it has no run\.json"):
        Run(tmp_path).read_info()


def test_making_a_run_object_touches_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    assert {p.parent for p in (run.plan, run.events, run.logs, run.checkpoints, run.report, run.curve)} == {run.path}
    assert not run.path.exists()


@pytest.mark.parametrize("data", [b"", b"new", os.urandom(100_003)])
def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    write_atomic(path, data)
    assert path.read_bytes() == data
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_crash_before_the_rename_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def crash(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
