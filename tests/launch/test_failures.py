"""Whatever goes wrong, a person reads why, once, within seconds, and nothing keeps running."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from command_line import Ended, train, training
from shoal.cli.main import main
from shoal.run import Run
from training_runs import events_of, final_state, newest_checkpoint

FAULTY = str(Path(__file__).parents[1] / "jobs" / "faulty.py")
JOB = f"{FAULTY}:job"
NOTICED_S = 8.0
"""From a worker's death to the end of the command: 3 seconds of grace, the rest is leave for a busy machine."""


@pytest.mark.parametrize(
    ("job", "options", "told"),
    [
        (f"{FAULTY}:jobb", [], "has no function 'jobb' (did you mean 'job'?)"),
        (FAULTY.replace("faulty", "fault") + ":job", [], "(did you mean 'faulty.py'?)"),
        (FAULTY, [], "expected path.py:function"),
        ("no.such.module:job", [], "there is no module 'no.such.module'"),
        (JOB, ["--set", "width=many"], "--set width: got 'many', expected a whole number"),
        (JOB, ["--set", "wide=3"], "(did you mean 'width'?)"),
        (JOB, ["--set", "width"], "expected name=value"),
        (JOB, ["--set", "fault=fire"], "got 'fire', expected"),
        (JOB, ["--nodes", "0"], "--nodes got 0, expected at least 1"),
        (JOB, ["--steps", "-3"], "stop.steps"),
        (JOB, ["--until", "val_loss=1"], "expected a condition such as"),
        (JOB, ["--plan", "nowhere.toml"], "cannot read nowhere.toml"),
        (JOB, ["--on", "moon"], "expected local or lab"),
        (JOB, ["--lab", "nodes=2"], "add --on lab"),
        (JOB, ["--resume"], "holds no run to resume"),
    ],
)
def test_wrong_usage_is_told_in_one_line_and_leaves_no_run(
    job: str,
    options: list[str],
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", ["shoal", "train", job, "--run", str(tmp_path / "run"), *options])
    with pytest.raises(SystemExit) as caught:
        main()
    printed = capsys.readouterr()
    assert caught.value.code == 2
    assert told in printed.err
    assert len(printed.err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_wrong_usage_ends_the_command_with_code_2(tmp_path: Path) -> None:
    ended = train(f"{FAULTY}:jobb", tmp_path / "run")
    assert ended.code == 2
    assert "did you mean 'job'" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_mistake_in_the_plan_is_told_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text("[batch]\nsize = 8\nacumulate = 2\n")
    ended = train(JOB, tmp_path / "run", "--plan", str(tmp_path / "plan.toml"))
    assert ended.code == 2
    assert "plan.toml:3: unknown key 'acumulate' (did you mean 'accumulate'?)" in ended.stderr
    assert not (tmp_path / "run").exists()


def test_a_job_that_raises_on_one_rank_shows_its_traceback_once_and_names_the_rank(tmp_path: Path) -> None:
    ended = train(JOB, tmp_path / "run", "--nodes", "3", "--steps", "9", "--set", "fault=raise")
    assert ended.code == 1
    assert ended.stderr.count("Traceback") == 1
    assert ended.stderr.count("LookupError: no such token: 'fish'") == 1
    assert "rank 1 failed" in ended.stderr
    assert frames(ended) == ["faulty.py", "faulty.py"]  # the loss, and what it called; none of ours


def test_a_dataset_that_raises_shows_only_the_users_own_frames(tmp_path: Path) -> None:
    ended = train(f"{FAULTY}:broken_data", tmp_path / "run", "--nodes", "2", "--epochs", "1")
    assert ended.code == 1
    assert ended.stderr.count("LookupError: sample 13 is torn") == 1
    assert frames(ended) == ["faulty.py"]


def frames(ended: Ended) -> list[str]:
    return [Path(name).name for name in re.findall(r'File "([^"]+)", line', ended.stderr)]


def test_a_function_that_makes_no_job_is_told_once(tmp_path: Path) -> None:
    ended = train(f"{FAULTY}:no_job", tmp_path / "run", "--nodes", "2", "--steps", "1")
    assert ended.code in (1, 2)
    assert ended.stderr.count("returned str, expected a shoal.Job") == 1
    assert "Traceback" not in ended.stderr


def test_fewer_samples_than_ranks_are_refused_once(tmp_path: Path) -> None:
    ended = train(JOB, tmp_path / "run", "--nodes", "3", "--steps", "9", "--set", "num_samples=2")
    assert ended.code == 1
    assert ended.stderr.count("the training data has 2 samples, fewer than the 3 ranks") == 1
    assert "Traceback" not in ended.stderr


def test_a_loss_that_is_not_a_number_stops_before_the_step_and_names_the_last_good_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text("[checkpoint]\nevery = 2\n")
    plan = ["--plan", str(tmp_path / "plan.toml")]
    ended = train(JOB, tmp_path / "run", "--nodes", "2", "--steps", "9", "--set", "fault=nan", *plan)
    assert ended.code == 1
    assert "not finite at step 5 on rank 1" in ended.stderr
    assert "step-00000004" in ended.stderr
    assert ended.stderr.count("not finite") == 1
    run = Run(tmp_path / "run")
    assert newest_checkpoint(run).name == "step-00000004"
    assert all(torch.isfinite(value).all() for value in final_state(run)["model"].values())


DIES = "died with signal 9 (SIGKILL)"


@pytest.mark.parametrize(
    ("fault", "rank", "told"),
    [
        ("exit", 1, "died with exit code 7"),
        ("kill", 0, DIES),
        pytest.param("exit", 0, "died with exit code 7", marks=pytest.mark.slow),
        pytest.param("kill", 1, DIES, marks=pytest.mark.slow),
    ],
)
def test_a_worker_that_dies_stops_the_others_within_seconds(fault: str, told: str, rank: int, tmp_path: Path) -> None:
    given = ["--nodes", "2", "--set", f"fault={fault}", "--set", f"rank={rank}", "--set", "at=20"]
    with training(JOB, tmp_path / "run", *given, "--set", "nap_s=0.01") as handle:
        handle.wait_for_step(15)
        started = time.monotonic()
        ended = handle.wait()
    assert time.monotonic() - started < NOTICED_S
    assert ended.code == 1
    assert f"rank {rank} {told}" in ended.stderr
    assert ("the disk of this rank is on fire" in ended.stderr) == (fault == "exit")
    assert "Traceback" not in ended.stderr


def test_a_worker_that_is_killed_while_others_compute_stops_them_too(tmp_path: Path) -> None:
    with training(JOB, tmp_path / "run", "--nodes", "3", "--set", "nap_s=0.3") as handle:
        handle.wait_for_step(1)
        handle.workers()[2].kill()
        started = time.monotonic()
        ended = handle.wait()
    assert time.monotonic() - started < NOTICED_S
    assert "rank 2 died with signal 9" in ended.stderr


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, id="ctrl-c"),
        pytest.param(signal.SIGTERM, id="sigterm", marks=pytest.mark.slow),
    ],
)
def test_asked_once_it_stops_cleanly_with_a_checkpoint_of_the_last_step(number: int, tmp_path: Path) -> None:
    with training(JOB, tmp_path / "run", "--nodes", "2", "--set", "nap_s=0.01", "--json") as handle:
        handle.wait_for_step(5)
        handle.launcher.send_signal(number)
        ended = handle.wait()
    assert ended.code == 0, ended.stderr
    run = Run(tmp_path / "run")
    assert ended.json["reason"] == "interrupted"
    assert ended.json["steps"] == events_of(run, "step")[-1]["step"]
    assert final_state(run)["progress"]["step"] == ended.json["steps"]
    assert "stopping after this step" in ended.stderr


def test_asked_before_the_first_step_it_still_stops_cleanly(tmp_path: Path) -> None:
    with training(JOB, tmp_path / "run", "--nodes", "2") as handle:
        while not (tmp_path / "run" / "events" / "launcher.jsonl").exists():
            time.sleep(0.01)
        time.sleep(0.3)
        handle.interrupt()
        ended = handle.wait()
    assert ended.code == 0, ended.stderr
    assert newest_checkpoint(Run(tmp_path / "run")).name == "step-00000001"


def test_asked_twice_it_stops_at_once(tmp_path: Path) -> None:
    with training(JOB, tmp_path / "run", "--nodes", "2", "--set", "nap_s=20", "--set", "at=2") as handle:
        handle.wait_for(lambda event: event["kind"] == "run_started")
        handle.interrupt()
        time.sleep(0.5)
        started = time.monotonic()
        handle.interrupt()
        ended = handle.wait()
    assert time.monotonic() - started < 3
    assert ended.code == 130
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("workers", [0, 2], ids=["no-loader-processes", "loader-processes"])
def test_no_worker_outlives_a_launcher_that_was_killed(workers: int, tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(f"[data]\nworkers = {workers}\n")
    given = ["--nodes", "2", "--set", "nap_s=0.2", "--plan", str(tmp_path / "plan.toml")]
    with training(JOB, tmp_path / "run", *given) as handle:
        handle.wait_for_step(2)
        left = handle.kill_launcher()
    assert len(left) == 2 * (1 + workers)
    deadline = time.monotonic() + 2
    while (alive := [p for p in left if is_alive(p)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    for process in alive:
        process.kill()
    assert not alive


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs; one that only waits for its new parent to take note of its end does not."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_loader_processes_feed_a_run_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text("[data]\nworkers = 2\n")
    with training(JOB, tmp_path / "run", "--steps", "9", "--plan", str(tmp_path / "plan.toml")) as handle:
        ended = handle.wait(30)
    assert ended.code == 0, ended.stderr


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = train(JOB, tmp_path / "run", "--steps", "1", "--port", str(port))
    assert ended.code == 1
    assert f"127.0.0.1:{port}" in ended.stderr
    assert "--port" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_run_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    ended = train(JOB, tmp_path / "file" / "run", "--steps", "1")
    assert ended.code == 2
    assert "cannot write to the run directory" in ended.stderr
    assert "--run" in ended.stderr


def test_an_existing_run_needs_resume(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    ended = train(JOB, tmp_path / "run", "--steps", "2")
    assert ended.code == 2
    assert "add --resume" in ended.stderr
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    made = os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mount)], capture_output=True, check=False
    )
    if not made or made.returncode != 0:
        pytest.skip("a small disk can only be mounted by root")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def test_a_full_disk_keeps_the_last_whole_checkpoint_and_says_so(small_disk: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text("[checkpoint]\nevery = 2\nkeep = 9\n")
    # A checkpoint takes about 0.5 MB: some fit, and the end does not.
    settings = ["--set", "width=22000", "--set", "rate=1e-9", "--plan", str(tmp_path / "plan.toml")]
    ended = train(JOB, small_disk / "run", "--nodes", "2", "--steps", "20", *settings)
    run = Run(small_disk / "run")
    assert ended.code == 1
    assert "No space left on device" in ended.stderr
    assert "earlier checkpoints are untouched" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert events_of(run, "step")[-1]["step"] == 20  # the training itself went on
    assert events_of(run, "checkpoint_failed")
    whole = newest_checkpoint(run)
    assert final_state(run)["progress"]["step"] == int(whole.name.removeprefix("step-"))
    assert not list(run.checkpoints.glob(".*"))


def test_a_disk_without_room_for_the_event_log_ends_the_run_in_one_line(small_disk: Path) -> None:
    with training(JOB, small_disk / "run", "--nodes", "2", "--set", "nap_s=0.01") as handle:
        handle.wait_for_step(3)
        with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
            while filler.write(bytes(4096)):
                pass
        ended = handle.wait(30)
    assert ended.code == 1
    assert "No space left on device" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_job_file_that_raises_when_it_is_imported_shows_only_its_own_frames(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text("raise RuntimeError('no fish today')\n")
    ended = train(f"{tmp_path / 'job.py'}:job", tmp_path / "run")
    assert ended.code != 0
    assert ended.stderr.count("RuntimeError: no fish today") == 1
    assert frames(ended) == ["job.py"]


def test_a_path_given_with_set_reaches_the_job(tmp_path: Path) -> None:
    job = tmp_path / "takes_a_path.py"
    job.write_text(
        "import sys\nfrom pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(FAULTY).parent)!r})\nimport faulty\n"
        "def job(folder: Path):\n    assert folder.name == 'fish'\n    return faulty.job()\n"
    )
    ended = train(f"{job}:job", tmp_path / "run", "--steps", "1", "--set", "folder=fish")
    assert ended.code == 0, ended.stderr
