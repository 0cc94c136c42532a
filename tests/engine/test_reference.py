"""Training on many ranks is training on one: held against a plain PyTorch loop in this file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from shoal.data.order import shuffled
from shoal.engine import random_state
from shoal.job.target import resolve
from shoal.run import Run
from training_runs import events_of, final_state, final_tensors, train_on

STEPS, BATCH, NUM_SAMPLES, CLIP_NORM, SEED = 20, 12, 50, 0.5, 5
TARGET = str(Path(__file__).parents[1] / "jobs" / "reference.py") + ":job"


@dataclass(frozen=True)
class Setup:
    """One way to train: the last batch of an epoch has 2 samples, fewer than 3 ranks."""

    nodes: str
    accumulate: int = 1
    form: str = "auto"
    shares: tuple[float, ...] | None = None

    def plan(self) -> str:
        shares = f"shares = {list(self.shares)}" if self.shares else ""
        return plan_text(f"form = '{self.form}'\nbucket_mb = 0.0005", f"accumulate = {self.accumulate}\n{shares}")

    def __str__(self) -> str:
        shares = "-".join(map(str, self.shares)) if self.shares else "even"
        return f"{self.nodes}_{self.form}_{shares}_accumulate-{self.accumulate}"


def plan_text(sync: str, batch: str, codec: str = "none", size: int = BATCH) -> str:
    return f"""
        seed = {SEED}
        [sync]
        {sync}
        [codec]
        kind = "{codec}"
        [batch]
        size = {size}
        {batch}
        [compute]
        device = "cpu"
        clip_norm = {CLIP_NORM}
        [stop]
        steps = {STEPS}
    """


SETUPS = [
    Setup("a"),
    Setup("a", accumulate=3),
    Setup("aa"),
    Setup("aa", accumulate=2, form="flat", shares=(3, 1)),
    Setup("aaa", accumulate=3, form="flat"),
    Setup("aaa", shares=(1, 2, 3.5)),
    Setup("aaaa", accumulate=2, form="hierarchical"),
    Setup("aaaa", accumulate=3, shares=(1, 0, 2, 1)),
    Setup("aaaa", form="flat", shares=(5, 1, 1, 1)),
    Setup("aab", accumulate=2, form="hierarchical", shares=(1, 2, 4)),
    Setup("abb"),
    Setup("aabb", accumulate=3, shares=(4, 3, 2, 1)),
    Setup("abab", form="hierarchical", shares=(1, 2, 1, 2)),
]
COVERED_BY_OTHERS = [SETUPS[0], SETUPS[6], SETUPS[12]]
TRAINED_TWICE = [SETUPS[3], SETUPS[11]]


@cache
def single_process(optimizer: str, num_samples: int, batch_size: int) -> tuple[dict[str, Tensor], list[float]]:
    """The reference: whole batches, one process, nothing of the engine but its seed; returns (parameters, losses)."""
    job = resolve(TARGET, [f"num_samples={num_samples}", f"optimizer={optimizer}"]).load()
    random_state.seed_all(SEED, 0)
    data, model = job.data(), job.model()
    trainable = [p for p in model.parameters() if p.requires_grad]
    update = job.optimizer(trainable)
    schedule = job.schedule(update)
    losses = []
    for step in range(STEPS):
        epoch, place = divmod(step, -(-num_samples // batch_size))
        order = shuffled(np.arange(num_samples), num_samples, seed=SEED, epoch=epoch)
        chosen = order[place * batch_size : (place + 1) * batch_size]
        update.zero_grad()
        loss = job.loss(model, data[torch.from_numpy(chosen)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, CLIP_NORM)
        update.step()
        schedule.step()
        losses.append(loss.item())
    return model.state_dict(), losses


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Setup], Run]:
    """The run of a setup, trained when it is first asked for."""
    return cache(
        lambda setup: train_on(list(setup.nodes), TARGET, setup.plan(), tmp_path_factory.mktemp("run") / "run")
    )


@pytest.mark.parametrize(
    "setup",
    [pytest.param(setup, id=str(setup), marks=[pytest.mark.slow] * (setup in COVERED_BY_OTHERS)) for setup in SETUPS],
)
def test_many_ranks_train_the_same_parameters_as_one_process(setup: Setup, first_run: Callable[[Setup], Run]) -> None:
    run = first_run(setup)
    expected, losses = single_process("adamw", NUM_SAMPLES, BATCH)
    trained = final_state(run)["model"]
    assert trained.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_difference(trained[name], value) < 1e-12, name
    assert [event["loss"] for event in events_of(run, "step")] == pytest.approx(losses, rel=1e-12)


@pytest.mark.parametrize("setup", TRAINED_TWICE, ids=str)
def test_the_same_plan_gives_the_same_bits(setup: Setup, first_run: Callable[[Setup], Run], tmp_path: Path) -> None:
    first, second = first_run(setup), train_on(list(setup.nodes), TARGET, setup.plan(), tmp_path / "run")
    assert_same_bits(final_tensors(first), final_tensors(second))
    losses = [[event["loss"] for event in events_of(run, "step")] for run in (first, second)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("nodes", ["aaa", "aabb"])
def test_with_a_lossy_codec_all_replicas_stay_equal_and_close_to_the_reference(nodes: str, tmp_path: Path) -> None:
    # Every value is rounded to bfloat16 at most twice on its way: contributions and their sum, by 2**-8 each. A clipped
    # gradient has norm <= CLIP_NORM and SGD moves by rate * gradient, so the two paths part by about
    # steps * rate * CLIP_NORM * 2 * 2**-8 at most; twice that for contributions that partly cancel.
    bound = 2 * STEPS * 1e-2 * CLIP_NORM * 2 * 2**-8
    (tmp_path / "digests").mkdir()
    settings = ["optimizer=sgd", "num_samples=48", f"digests={tmp_path / 'digests'}"]
    form = "flat" if nodes == "aaa" else "hierarchical"
    run = train_on(
        list(nodes), TARGET, plan_text(f"form = '{form}'", "", codec="bf16"), tmp_path / "run", settings=settings
    )
    expected, _ = single_process("sgd", 48, BATCH)
    trained = final_state(run)["model"]
    distance = torch.stack([(trained[name] - value).square().sum() for name, value in expected.items()]).sum().sqrt()
    assert 0 < distance < bound
    digests = [path.read_text() for path in sorted((tmp_path / "digests").iterdir())]
    assert len(digests) == len(nodes)
    assert len(digests[0].splitlines()) == STEPS
    assert len(set(digests)) == 1


def test_running_statistics_are_those_of_the_ranks_that_saw_samples(tmp_path: Path) -> None:
    target = TARGET.replace(":job", ":normalized")
    run = train_on(["a", "a"], target, plan_text("", "shares = [1, 0]"), tmp_path / "run")
    random_state.seed_all(SEED, 0)
    job = resolve(target).load()
    data, model = job.data(), job.model()
    for step in range(STEPS):
        epoch, place = divmod(step, 4)
        order = shuffled(np.arange(48), 48, seed=SEED, epoch=epoch)
        model(*data[torch.from_numpy(order[place * BATCH : (place + 1) * BATCH])][::2])
    trained = final_state(run)["model"]
    for name in ("norm.running_mean", "norm.running_var"):
        assert relative_difference(trained[name], model.state_dict()[name]) < 1e-12, name


def relative_difference(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    differing = [name for name in one if one[name].numpy().tobytes() != other[name].numpy().tobytes()]
    assert not differing
