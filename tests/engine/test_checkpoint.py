"""Checkpoints hold a state exactly, are whole or not there, and are written beside the training."""

from __future__ import annotations

import contextlib
import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR, OneCycleLR, SequentialLR

from shoal.engine.checkpoint import archive, tree
from shoal.engine.checkpoint.archive import Archive
from shoal.engine.checkpoint.writer import CheckpointWriter
from shoal.errors import CheckpointError
from shoal.events import EventLog, read_events

keys = st.text(max_size=4) | st.integers(-3, 99)
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=12,
)


def round_trip(value: Any, folder: Path | None = None) -> Any:
    encoded, tensors = tree.encode(value, "root")
    if folder is not None:
        Archive(folder, keep=1, keep_best=False).write(1, encoded, tensors, best=False)
        return tree.decode(*archive.read(folder / "step-00000001"))
    return tree.decode(json.loads(json.dumps(encoded)), tensors)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        bits = one.contiguous().flatten().view(torch.uint8), other.contiguous().flatten().view(torch.uint8)
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)
    if isinstance(one, float) and math.isnan(one):
        return isinstance(other, float) and math.isnan(other)
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


@given(value=trees)
def test_plain_values_come_back_as_they_were(value: Any) -> None:
    assert same(round_trip(value), value)


def test_names_that_look_like_the_formats_own_come_back_too() -> None:
    value = {"tensor": 1, "tuple": [2], "items": {"items": (3,)}, 0: {"tensor": "root.x"}}
    assert same(round_trip(value), value)


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool
]  # fmt: skip


def test_tensors_of_every_dtype_and_shape_come_back_bit_by_bit(tmp_path: Path) -> None:
    value = {str(dtype): torch.randn(3, 4).mul(9).to(dtype) for dtype in DTYPES}
    value |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "nothing": torch.empty(0)}
    value |= {"odd": torch.tensor([math.nan, math.inf, -math.inf, -0.0, 5e-324], dtype=torch.float64)}
    assert same(round_trip(value, tmp_path), value)


def test_tied_tensors_are_stored_once(tmp_path: Path) -> None:
    shared = torch.randn(100)
    encoded, tensors = tree.encode({"a": shared, "b": [shared], "c": shared[:50]}, "root")
    assert len(tensors) == 2
    decoded = tree.decode(encoded, tensors)
    assert torch.equal(decoded["a"], decoded["b"][0])
    assert torch.equal(decoded["c"], shared[:50])


@pytest.mark.parametrize("bad", [object(), {1.5: 2}, {(1, 2): 3}, {1, 2}, torch.eye(3).to_sparse(), 1j])
def test_what_has_no_plain_form_is_refused_with_its_place(bad: Any) -> None:
    with pytest.raises(CheckpointError, match=r"cannot save root\.x\.0"):
        tree.encode({"x": [bad]}, "root")


SCHEDULES = [
    lambda o: MultiStepLR(o, [2, 4]),
    lambda o: CosineAnnealingLR(o, 10),
    lambda o: OneCycleLR(o, 0.1, total_steps=20),
    lambda o: SequentialLR(o, [MultiStepLR(o, [1]), CosineAnnealingLR(o, 5)], [3]),
]


@pytest.mark.parametrize("make", SCHEDULES, ids=["multi-step", "cosine", "one-cycle", "sequential"])
@pytest.mark.parametrize("optimizer", [SGD, AdamW])
def test_optimizers_and_schedules_go_on_from_what_was_stored(make: Any, optimizer: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3)

    def build() -> tuple[nn.Module, Any, LRScheduler]:
        torch.manual_seed(1)
        model = nn.Linear(3, 2)
        update = optimizer(model.parameters(), lr=0.1, **({"momentum": 0.9} if optimizer is SGD else {}))
        return model, update, make(update)

    def train(model: nn.Module, update: Any, schedule: LRScheduler, steps: int) -> None:
        for _ in range(steps):
            update.zero_grad()
            model(x).square().mean().backward()
            update.step()
            schedule.step()

    whole, stopped, resumed = build(), build(), build()
    train(*whole, 9)
    train(*stopped, 4)
    stored = round_trip([part.state_dict() for part in stopped], tmp_path)
    for part, state in zip(resumed, stored, strict=True):
        part.load_state_dict(state)
    train(*resumed, 5)
    assert same(resumed[0].state_dict(), whole[0].state_dict())
    assert resumed[2].get_last_lr() == whole[2].get_last_lr()


def write(store: Archive, step: int, *, best: bool = False) -> Path:
    return store.write(step, {"step": step}, {"x": torch.full((4,), float(step))}, best=best)[0]


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_the_last_few_are_kept(keep: int, tmp_path: Path) -> None:
    store = Archive(tmp_path, keep=keep, keep_best=False)
    for step in range(10, 80, 10):
        write(store, step, best=step == 20)
    assert steps(tmp_path) == list(range(10, 80, 10))[-keep:]


def test_the_best_is_kept_however_old_it_is(tmp_path: Path) -> None:
    store = Archive(tmp_path, keep=2, keep_best=True)
    for step in range(10, 80, 10):
        write(store, step, best=step in (10, 30))
    assert steps(tmp_path) == [30, 60, 70]


def test_steps_are_in_order_however_many_digits_they_have(tmp_path: Path) -> None:
    store = Archive(tmp_path, keep=2, keep_best=False)
    for step in (99_999_998, 99_999_999, 100_000_000, 100_000_001):
        write(store, step)
    assert steps(tmp_path) == [100_000_000, 100_000_001]
    assert [saved.step for saved in store.list()] == [100_000_000, 100_000_001]


def test_a_step_may_be_written_again(tmp_path: Path) -> None:
    store = Archive(tmp_path, keep=2, keep_best=True)
    write(store, 5)
    write(store, 5, best=True)
    assert [(saved.step, saved.best) for saved in store.list()] == [(5, True)]


@pytest.mark.parametrize("renames_before", [0, 1, 2])
@pytest.mark.parametrize("refused", [False, True], ids=["crash", "refusal"])
def test_writing_a_step_again_never_leaves_less_than_one_whole(
    renames_before: int, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Archive(tmp_path, keep=1, keep_best=True)
    write(store, 5)
    rename, done = Path.rename, []

    def fail(self: Path, target: Path) -> Path:
        done.append(self)
        if len(done) == renames_before + 1:
            raise OSError(5, "Input/output error") if refused else KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt, CheckpointError):
        patch.setattr(Path, "rename", fail)
        write(store, 5, best=True)
    if not refused:  # a refusal is mended at once, a crash when the run is resumed
        store.sweep()
    assert steps(tmp_path) == [5]
    assert archive.read(tmp_path / "step-00000005")[0] == {"step": 5}
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("keep", [1, 2])
def test_what_was_just_written_is_never_pruned_in_favour_of_a_later_one_that_is_damaged(
    name: str, keep: int, tmp_path: Path
) -> None:
    store = Archive(tmp_path, keep=keep, keep_best=False)
    write(store, 100)
    write(store, 300)
    (tmp_path / "step-00000300" / name).unlink()
    path = write(store, 200)  # the run went back to 100
    assert archive.read(path)[0] == {"step": 200}


def test_a_refusing_disk_leaves_what_stood_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Archive(tmp_path, keep=1, keep_best=False)
    write(store, 5)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    for place in ("sync_folder", "_sync_file", "_describe"):
        with monkeypatch.context() as patch:
            patch.setattr(archive, place, refuse)
            if place != "sync_folder":
                with pytest.raises(CheckpointError, match="No space left on device"):
                    write(store, 6)
    with monkeypatch.context() as patch:
        patch.setattr(archive, "save_tensors", refuse)
        with pytest.raises(CheckpointError, match=r"step-00000007.*No space left.*free there; earlier checkpoints"):
            write(store, 7)
    assert steps(tmp_path) == [5]
    assert not list(tmp_path.glob(".*"))
    assert archive.read(tmp_path / "step-00000005")[0] == {"step": 5}


def test_every_byte_of_a_checkpoint_is_checked(tmp_path: Path) -> None:
    path = write(Archive(tmp_path, keep=1, keep_best=False), 5)
    for name in ("tensors.safetensors", "state.json"):
        content = (path / name).read_bytes()
        for place in range(0, len(content), 3):
            damaged = bytearray(content)
            damaged[place] ^= 0x10
            (path / name).write_bytes(damaged)
            with pytest.raises(CheckpointError, match=rf"step-00000005 is damaged.*{name}"):
                archive.read(path)
        for damaged in (content[:-1], content + b" ", b""):
            (path / name).write_bytes(damaged)
            with pytest.raises(CheckpointError, match=rf"step-00000005 is damaged.*{name}"):
                archive.read(path)
        (path / name).write_bytes(content)
    assert archive.read(path)[0] == {"step": 5}


@pytest.mark.parametrize("manifest", ["", "{}", "[]", "null", '{"format": 1}', '{"format": 1, "files": []}', "{"])
def test_a_manifest_that_is_none_makes_a_damaged_checkpoint(manifest: str, tmp_path: Path) -> None:
    store = Archive(tmp_path, keep=1, keep_best=False)
    path = write(store, 5)
    (path / "manifest.json").write_text(manifest)
    with pytest.raises(CheckpointError, match="step-00000005"):
        archive.read(path)
    assert [saved.step for saved in store.list()] == [-1]


def test_no_byte_of_the_manifest_can_change_unnoticed(tmp_path: Path) -> None:
    path = write(Archive(tmp_path, keep=1, keep_best=False), 5)
    whole = (path / "manifest.json").read_bytes()
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1
        (path / "manifest.json").write_bytes(changed)
        with pytest.raises(CheckpointError, match="step-00000005"):
            archive.read(path)


def test_a_manifest_must_name_both_files(tmp_path: Path) -> None:
    path = write(Archive(tmp_path, keep=1, keep_best=False), 5)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"files": {}}))
    with pytest.raises(CheckpointError, match="step-00000005 is damaged"):
        archive.read(path)


def test_another_versions_format_is_named(tmp_path: Path) -> None:
    path = write(Archive(tmp_path, keep=1, keep_best=False), 5)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(CheckpointError, match="has format 99, expected 3"):
        archive.read(path)


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[CheckpointWriter]:
    (tmp_path / "events").mkdir()
    with EventLog(tmp_path / "events" / "rank-0.jsonl", "rank-0") as log:
        made = CheckpointWriter(Archive(tmp_path / "checkpoints", keep=9, keep_best=True), log)
        yield made
        made.close()


def stored(folder: Path, step: int) -> Any:
    document, tensors = archive.read(folder / "checkpoints" / f"step-{step:08d}")
    return tree.decode(document["state"], tensors), document["late"]


def test_what_is_stored_is_the_state_at_the_beginning(writer: CheckpointWriter, tmp_path: Path) -> None:
    weight, statistic = torch.zeros(100_000), torch.zeros(10)
    for step in range(1, 6):
        writer.begin(step, {"w": weight, "s": statistic}, best=False, volatile=[statistic], late=lambda: ("late", []))
        statistic.add_(1)  # a buffer may change at once
        writer.before_update()
        weight.add_(1)  # a parameter only after this
    writer.wait()
    for step in range(1, 6):
        state, late = stored(tmp_path, step)
        assert torch.all(state["w"] == step - 1)
        assert torch.all(state["s"] == step - 1)
        assert late == "late"


def test_training_goes_on_while_the_disk_writes(writer: CheckpointWriter, tmp_path: Path) -> None:
    disk = threading.Event()
    writer.begin(1, {"w": torch.ones(3)}, best=False, volatile=[], late=lambda: (disk.wait(10), []))
    writer.before_update()  # returns although nothing is written yet
    assert not (tmp_path / "checkpoints").exists()
    disk.set()
    writer.wait()
    assert torch.all(stored(tmp_path, 1)[0]["w"] == 1)


def test_views_of_any_stride_are_stored_as_what_they_show(writer: CheckpointWriter, tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    state = {"t": base.t(), "part": base[:, 1], "wide": torch.ones(1).expand(5), "last": base.flip(0)[1:]}
    expected = {name: value.clone() for name, value in state.items()}
    writer.begin(1, {"model": state}, best=False, volatile=list(state.values()), late=lambda: (None, []))
    writer.wait()
    writer.begin(2, {"model": state}, best=False, volatile=[], late=lambda: (None, []))
    writer.wait()
    assert writer.failed is None
    for step in (1, 2):
        for name, value in stored(tmp_path, step)[0]["model"].items():
            assert torch.equal(value, expected[name]), name


def test_a_failure_is_logged_remembered_and_forgotten_after_a_success(
    writer: CheckpointWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(archive, "save_tensors", refuse)
        writer.begin(1, {"w": torch.ones(3)}, best=False, volatile=[], late=lambda: (None, []))
        writer.wait()
    assert writer.failed is not None
    assert "No space left on device" in writer.failed
    writer.begin(2, {"w": torch.ones(3)}, best=False, volatile=[], late=lambda: (None, []))
    writer.wait()
    assert writer.failed is None
    assert [e["kind"] for e in read_events(tmp_path / "events")] == ["checkpoint_failed", "checkpoint_saved"]


def test_a_state_that_has_diverged_takes_no_good_ones_place(writer: CheckpointWriter, tmp_path: Path) -> None:
    weights, mask = torch.ones(3), torch.full((2,), -math.inf)
    for step, value in ((1, 1.0), (2, math.inf)):
        weights.fill_(value)
        state = {"model": {"weights": weights, "mask": mask}}
        writer.begin(step, state, best=False, volatile=[mask], late=lambda: (None, []))
        writer.wait()
    assert writer.failed is not None
    assert "model.weights is not finite" in writer.failed
    assert [saved.step for saved in Archive(tmp_path / "checkpoints", keep=2, keep_best=True).list()] == [1]
