"""A run that was killed at any moment goes on as if nothing had happened."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from command_line import train, training
from shoal.engine.checkpoint.archive import Archive
from shoal.engine.checkpoint.session import CheckpointSession
from shoal.errors import CheckpointError, PlanError, UsageError
from shoal.events import EventLog
from shoal.job.target import resolve
from shoal.run import Run
from shoal.training import Where, execute
from training_runs import events_of, final_tensors, newest_checkpoint

JOB = str(Path(__file__).parents[1] / "jobs" / "random.py") + ":job"
STEPS, BATCH, NUM_SAMPLES = 60, 10, 46
PLAN = f"""
seed = 9
[batch]
size = {BATCH}
accumulate = 2
shares = [2, 1]
[compute]
device = "cpu"
clip_norm = 1.0
[validation]
every = 12
[checkpoint]
every = 5
keep = 3
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    (folder / "plan.toml").write_text(PLAN)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> Run:
    """All steps in one go."""
    log = folder / "uninterrupted-log"
    log.mkdir()
    ended = train(JOB, folder / "whole", *options(folder, log))
    assert ended.code == 0, ended.stderr
    return Run(folder / "whole")


def options(folder: Path, log: Path, *, steps: int = STEPS, nap_s: float = 0.0) -> list[str]:
    given = ["--plan", str(folder / "plan.toml"), "--nodes", "2", "--steps", str(steps)]
    return [*given, "--set", f"log={log}", "--set", f"nap_s={nap_s}"]


def losses(run: Run) -> dict[int, float]:
    """Every step's loss. A step that was done twice, before a kill and again after it, had the same loss both times."""
    found: dict[int, float] = {}
    for event in events_of(run, "step"):
        assert found.setdefault(event["step"], event["loss"]) == event["loss"]
    return found


def assert_same_training(run: Run, other: Run) -> None:
    assert losses(run) == losses(other)
    one, two = final_tensors(run), final_tensors(other)
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    validations = [[(e["step"], e["loss"], e["best"]) for e in events_of(r, "validation")] for r in (run, other)]
    assert list(dict.fromkeys(validations[0])) == list(dict.fromkeys(validations[1]))


def test_killed_three_times_it_ends_with_the_same_bits_and_sees_each_sample_once_an_epoch(
    folder: Path, uninterrupted: Run
) -> None:
    run, log = folder / "killed", folder / "killed-log"
    log.mkdir()
    given = options(folder, log, nap_s=0.01)
    for step in (8, 21, 44):
        resume = ["--resume"] if run.exists() else []
        with training(JOB, run, *given, *resume) as handle:
            handle.wait_for_step(step)
            handle.kill_everything()
    ended = train(JOB, run, *given, "--resume", "--json")
    assert ended.code == 0, ended.stderr
    assert ended.json["steps"] == STEPS
    assert_same_training(Run(run), uninterrupted)
    assert fetched_by_committed_steps(Run(run), log) == fetched_by_committed_steps(
        uninterrupted, folder / "uninterrupted-log"
    )


def fetched_by_committed_steps(run: Run, log: Path) -> dict[int, Counter[int]]:
    """For each epoch, how often each index was fetched for a step that counted; whole epochs only hold each once."""
    starts = [0] + [event["step"] for event in events_of(run, "resumed")]
    epochs: dict[int, Counter[int]] = {}
    for rank in (0, 1):
        attempts = sorted(log.glob(f"{rank}-*"), key=lambda path: path.stat().st_mtime)
        assert len(attempts) == len(starts)
        steps = {event["step"]: event for event in events_of(run, "step", f"rank-{rank}")}
        for path, first, last in zip(attempts, starts, [*starts[1:], STEPS], strict=True):
            indices = iter(map(int, path.read_text().split()))
            for step in range(first + 1, last + 1):
                event = steps[step]
                epochs.setdefault(event["epoch"], Counter()).update(next(indices) for _ in range(event["share"]))
    for epoch in range(STEPS * BATCH // (NUM_SAMPLES + BATCH)):
        assert epochs[epoch] == Counter(range(NUM_SAMPLES)), f"epoch {epoch}"
    return epochs


@pytest.mark.parametrize("after_s", [1.5, pytest.param(3.0, marks=pytest.mark.slow)])
def test_killed_while_it_starts_it_still_resumes(after_s: float, folder: Path, uninterrupted: Run) -> None:
    run, log = folder / f"early-{after_s}", folder / f"early-{after_s}-log"
    log.mkdir()
    given = options(folder, log)
    with training(JOB, run, *given) as handle:
        time.sleep(after_s)
        handle.kill_everything()
    resume = ["--resume"] if (run / "run.json").exists() else []
    ended = train(JOB, run, *given, *resume)
    assert ended.code == 0, ended.stderr
    assert_same_training(Run(run), uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("after_s", [0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4])
def test_killed_at_any_moment_of_training_it_ends_with_the_same_bits(
    after_s: float, folder: Path, uninterrupted: Run
) -> None:
    run, log = folder / f"any-{after_s}", folder / f"any-{after_s}-log"
    log.mkdir()
    given = options(folder, log, nap_s=0.005)
    with training(JOB, run, *given) as handle:
        handle.wait_for_step(1)
        time.sleep(after_s)
        handle.kill_everything()
    ended = train(JOB, run, *given, "--resume")
    assert ended.code == 0, ended.stderr
    assert_same_training(Run(run), uninterrupted)


def test_more_steps_go_on_from_the_end_as_if_they_had_been_asked_for_at_once(folder: Path, uninterrupted: Run) -> None:
    run, log = folder / "more", folder / "more-log"
    log.mkdir()
    # 36 is a multiple of both periods: the end of the first part adds no validation that the whole does not have.
    assert train(JOB, run, *options(folder, log, steps=36)).code == 0
    assert train(JOB, run, *options(folder, log), "--resume").code == 0
    assert_same_training(Run(run), uninterrupted)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(folder: Path, uninterrupted: Run) -> None:
    run = Run(folder / "damaged")
    shutil.copytree(uninterrupted.path, run.path)
    flip_a_byte(newest_checkpoint(run))
    ended = train(JOB, run.path, *options(folder, folder / "uninterrupted-log"), "--resume")
    assert ended.code == 0, ended.stderr
    damaged = events_of(run, "checkpoint_damaged")
    assert [event["checkpoint"] for event in damaged] == ["step-00000060"]
    assert "tensors.safetensors" in damaged[0]["message"]
    assert events_of(run, "resumed")[0]["step"] == 55
    assert_same_training(run, uninterrupted)


def flip_a_byte(checkpoint: Path) -> None:
    path = checkpoint / "tensors.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def truncate(checkpoint: Path) -> None:
    path = checkpoint / "state.json"
    path.write_bytes(path.read_bytes()[:-10])


def delete_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


def delete_tensors(checkpoint: Path) -> None:
    (checkpoint / "tensors.safetensors").unlink()


def empty_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_text("{}")


def manifest_of_nothing(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_text("[]")


def empty_tensors(checkpoint: Path) -> None:
    (checkpoint / "tensors.safetensors").write_bytes(b"")


DAMAGES = [
    flip_a_byte, truncate, delete_manifest, delete_tensors, empty_manifest, manifest_of_nothing, empty_tensors
]  # fmt: skip


@dataclass
class Alone:
    """The only rank."""

    store: dist.Store
    rank: int = 0
    size: int = 1


def session(run: Run, log: EventLog) -> CheckpointSession:
    archive = Archive(run.checkpoints, keep=3, keep_best=True)
    return CheckpointSession(Alone(dist.HashStore()), archive, log, torch.device("cpu"))


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_kind_of_damage_is_noticed(damage: Callable[[Path], None], tmp_path: Path, uninterrupted: Run) -> None:
    run = Run(tmp_path / "run")
    shutil.copytree(uninterrupted.path, run.path)
    damage(run.checkpoints / "step-00000060")
    with EventLog(run.events / "rank-0.jsonl", "rank-0") as log:
        state = session(run, log).restore({})
    assert state is not None
    assert state["progress"]["step"] == 55
    assert [event["checkpoint"] for event in events_of(run, "checkpoint_damaged")] == ["step-00000060"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_without_one_whole_checkpoint_nothing_is_resumed(
    damage: Callable[[Path], None], tmp_path: Path, uninterrupted: Run
) -> None:
    run = Run(tmp_path / "run")
    shutil.copytree(uninterrupted.path, run.path)
    names = sorted(path.name for path in run.checkpoints.iterdir())
    for name in names:
        damage(run.checkpoints / name)
    with (
        EventLog(run.events / "rank-0.jsonl", "rank-0") as log,
        pytest.raises(CheckpointError, match="no checkpoint is whole") as caught,
    ):
        session(run, log).restore({})
    assert all(name in str(caught.value) for name in names)


def test_half_written_checkpoints_are_swept(tmp_path: Path, uninterrupted: Run) -> None:
    run = Run(tmp_path / "run")
    shutil.copytree(uninterrupted.path, run.path)
    shutil.copytree(newest_checkpoint(run), run.checkpoints / ".step-00000065.tmp")
    with EventLog(run.events / "rank-0.jsonl", "rank-0") as log:
        state = session(run, log).restore({})
    assert state is not None
    assert state["progress"]["step"] == STEPS
    assert not list(run.checkpoints.glob(".*"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("size = 10", "size = 11"), "batch was size=10"),
        (("seed = 9", "seed = 10"), "seed was 9"),
        (("clip_norm = 1.0", "clip_norm = 2.0"), "compute was clip_norm=1.0"),
    ],
)
def test_a_changed_plan_is_refused(
    change: tuple[str, str], told: str, folder: Path, tmp_path: Path, uninterrupted: Run
) -> None:
    (tmp_path / "plan.toml").write_text(PLAN.replace(*change))
    before = content(uninterrupted)
    with pytest.raises(PlanError, match=f"cannot resume: {told}"):
        resume(uninterrupted, folder, plan=tmp_path / "plan.toml")
    assert content(uninterrupted) == before


def test_another_number_of_ranks_or_other_arguments_are_refused(folder: Path, uninterrupted: Run) -> None:
    before = content(uninterrupted)
    with pytest.raises(PlanError, match="3 ranks"):
        resume(uninterrupted, folder, nodes=3)
    with pytest.raises(UsageError, match="num_samples"):
        resume(uninterrupted, folder, settings=["num_samples=99"])
    assert content(uninterrupted) == before


def resume(run: Run, folder: Path, *, plan: Path | None = None, nodes: int = 2, settings: Sequence[str] = ()) -> None:
    target = resolve(JOB, [f"log={folder / 'uninterrupted-log'}", "nap_s=0.0", *settings])
    execute(target, plan, Where(nodes=nodes), run.path, resume=True, limits={"steps": STEPS})


def content(run: Run) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
