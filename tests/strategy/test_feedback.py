"""Error feedback loses nothing: what was decoded and what waits is what was given, on every rank and at both stages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shoal.plan import parse_plan
from shoal.strategy.bucket import Bucket, Piece
from shoal.strategy.codec import CODECS, make_codec
from shoal.strategy.codec.feedback import Coder
from shoal.strategy.sync.algorithms import Algorithm
from shoal.strategy.sync.summation import Form, Summation
from shoal.strategy.topology import topologies
from shoal.wire.inprocess import run_in_process
from shoal.wire.transport import Memory

BIASED = [name for name, codec in CODECS.items() if codec.biased]
LOSSY = [name for name in CODECS if name != "none"]
LAYOUTS = ["ab", "aab", "abc", "abab", "abcd", "aaabb"]
LIBRARY: Algorithm = "library"


def make_coder(kind: str, rank: int = 0, settings: str = "") -> Coder:
    config = parse_plan(f'[codec]\nkind = "{kind}"\n{settings}\n', origin="test").codec
    return Coder(make_codec(config), config, rank=rank)


class Cluster:
    """Ranks that sum one bucket again and again."""

    def __init__(self, layout: str, kind: str, num_values: int, settings: str = "", form: Form = "auto") -> None:
        self.views = topologies(layout)
        self.num_values = num_values
        self.coders = [make_coder(kind, view.rank, settings) for view in self.views]
        self.sums = [Summation(v, c, form, LIBRARY) for v, c in zip(self.views, self.coders, strict=True)]
        columns = num_values // 40
        vector = num_values - 40 * columns
        self.pieces = (Piece(0, torch.Size([vector])), Piece(vector, torch.Size([40, columns])))

    def step(self, given: Tensor) -> list[Tensor]:
        """What each rank receives when rank r gives given[r]."""
        made = []
        for values in given:
            source = torch.cat([values, values.new_ones(1)])
            memory = Memory(source, source, slice(0, len(source)))
            made.append(Bucket.over("bucket", memory, self.num_values, self.pieces))
        exchanges = [s.exchange(bucket) for s, bucket in zip(self.sums, made, strict=True)]
        run_in_process(exchanges, lambda rank, group: self.views[rank].members(group))
        return [bucket.target[: self.num_values].clone() for bucket in made]

    def waiting(self) -> Tensor:
        """The sum of all residuals, shape (num_values,)."""
        total = torch.zeros(self.num_values, dtype=torch.float64)
        speakers = [v.rank for v in self.views if v.is_leader] if self.sums[0].hierarchical else range(len(self.views))
        for index, rank in enumerate(speakers):
            memory = self.coders[rank].state_dict()["memory"]
            own = memory.get("bucket/own", {}).get("residual")
            if own is not None:
                total += own.flatten()[: self.num_values]
            part = memory.get("bucket/sum", {}).get("residual")
            if part is not None:
                length = part.shape[1]
                first, last = index * length, min((index + 1) * length, self.num_values)
                total[first:last] += part[0, : max(0, last - first)]
        return total


def given_by(layout: str, num_values: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(len(layout), num_values, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("kind", BIASED)
@pytest.mark.parametrize("form", ["flat", "auto"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_received_and_what_waits_is_what_was_given(kind: str, form: Form, layout: str) -> None:
    n = 331
    cluster = Cluster(layout, kind, n, form=form)
    given, received = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    for step in range(6):
        contributions = given_by(layout, n, step)
        given += contributions.sum(dim=0)
        targets = cluster.step(contributions)
        assert all(torch.equal(target, targets[0]) for target in targets)
        received += targets[0]
        torch.testing.assert_close(received + cluster.waiting(), given, rtol=1e-9, atol=1e-9)


@given(
    kind=st.sampled_from(BIASED),
    layout=st.sampled_from(LAYOUTS),
    num_values=st.sampled_from([0, 1, 2, 7, 63, 257, 1025]),
    form=st.sampled_from(["flat", "auto"]),
)
def test_nothing_is_lost_at_any_size(kind: str, layout: str, num_values: int, form: Form) -> None:
    cluster = Cluster(layout, kind, num_values, form=form)
    given, received = torch.zeros(2, num_values, dtype=torch.float64)
    for step in range(2):
        contributions = given_by(layout, num_values, step)
        given += contributions.sum(dim=0)
        received += cluster.step(contributions)[0]
    torch.testing.assert_close(received + cluster.waiting(), given, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", BIASED)
def test_the_mean_of_many_steps_comes_close_to_what_is_given_each_time(kind: str) -> None:
    contributions = given_by("abcd", 331, 0)
    cluster, total, steps = Cluster("abcd", kind, 331), torch.zeros(331, dtype=torch.float64), 200
    for _ in range(steps):
        total += cluster.step(contributions)[0]
    error = (total / steps - contributions.sum(dim=0)).norm() / contributions.sum(dim=0).norm()
    assert error < 0.12


@pytest.mark.parametrize("kind", LOSSY)
@pytest.mark.parametrize("layout", ["ab", "aabb", "abcd"])
def test_a_restart_goes_on_to_the_bit(kind: str, layout: str) -> None:
    first = Cluster(layout, kind, 300)
    for step in range(3):
        first.step(given_by(layout, 300, step))
    second = Cluster(layout, kind, 300)
    for one, other in zip(first.coders, second.coders, strict=True):
        other.load_state_dict(one.state_dict())
    for step in range(3, 6):
        contributions = given_by(layout, 300, step)
        for ours, theirs in zip(first.step(contributions), second.step(contributions), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", LOSSY)
def test_a_warm_up_sends_everything_as_it_is(kind: str) -> None:
    cluster = Cluster("abc", kind, 300, "warmup_steps = 2")
    errors = []
    for step in range(3):
        contributions = given_by("abc", 300, step)
        errors.append((cluster.step(contributions)[0] - contributions.sum(dim=0)).abs().max())
    assert max(errors[:2]) < 1e-12
    assert errors[2] > 1e-6


@pytest.mark.parametrize("kind", BIASED)
def test_without_feedback_nothing_waits(kind: str) -> None:
    cluster = Cluster("abc", kind, 300, "error_feedback = false")
    cluster.step(given_by("abc", 300, 0))
    assert all(coder.residual_norm() == 0 for coder in cluster.coders)


@pytest.mark.parametrize("kind", LOSSY)
def test_the_residuals_norm_and_what_a_reset_leaves(kind: str) -> None:
    cluster = Cluster("ab", kind, 300, "error_feedback = true")
    cluster.step(given_by("ab", 300, 0))
    assert all(coder.residual_norm() > 0 for coder in cluster.coders)
    cluster.coders[0].reset()
    assert cluster.coders[0].residual_norm() == 0
    assert cluster.coders[0].state_dict()["counts"] == {"bucket": 1}


@pytest.mark.parametrize("kind", CODECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_given_is_left_as_it_was(kind: str, dtype: torch.dtype) -> None:
    coder = make_coder(kind, settings="error_feedback = true")
    values = given_by("ab", 300, 0).to(dtype)
    before = values.clone()
    for _ in range(3):
        coder.begin("bucket")
        coder.encode("bucket", values)
    assert torch.equal(values, before)


@pytest.mark.parametrize("kind", CODECS)
def test_bytes_can_be_foretold_with_nothing_but_shapes(kind: str) -> None:
    sent: dict[str, list[Any]] = {}
    for device in ("cpu", "meta"):
        coder = make_coder(kind)
        sum_ = Summation(topologies("abcd")[1], coder, "auto", LIBRARY)
        source = torch.zeros(2001, device=device)
        bucket = Bucket.over("b", Memory(source, source, slice(0, 2001)), 2000, (Piece(0, torch.Size([50, 40])),))
        exchange, answer, sizes = sum_.exchange(bucket), None, []
        try:
            while True:
                op = exchange.send(answer)
                tensor = getattr(op, "tensor", None)
                sizes.append((type(op).__name__, (op.source if tensor is None else tensor).nbytes))
                answer = tensor if type(op).__name__ == "AllToAll" else None
                answer = tensor.expand(4, -1) if type(op).__name__ == "AllGather" else answer
        except StopIteration:
            sent[device] = sizes
    assert sent["cpu"] == sent["meta"] != []
