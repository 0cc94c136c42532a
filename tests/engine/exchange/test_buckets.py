"""Gradients reach their buckets whole, leave in a fixed order as soon as they can, and come back where they belong."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shoal.engine.exchange.buckets import GradientBuckets
from shoal.engine.layout.replica import Replica
from shoal.errors import JobError
from shoal.wire.transport import Memory, private_memory

EVERYTHING, ONE_EACH = 10**9, 1


class Rig:
    """Buckets in this process's own memory; `sent` is the log of what left, and when its values were what."""

    def __init__(self, model: nn.Module, bucket_bytes: int) -> None:
        self.sent: list[tuple[int, Tensor]] = []
        self.allocated: list[tuple[int, int, torch.dtype]] = []
        self.buckets = GradientBuckets(
            Replica.whole(model),
            bucket_bytes,
            self.allocate,
            lambda index, bucket: self.sent.append((index, bucket.source.clone())),
        )

    def allocate(self, index: int, num_values: int, dtype: torch.dtype) -> Memory:
        self.allocated.append((index, num_values, dtype))
        return private_memory(num_values, dtype, torch.device("cpu"))

    def step(self, losses: Iterable[Tensor]) -> None:
        """One step over micro-batches whose losses are made when they are due."""
        self.buckets.begin()
        pending = list(losses)
        for index, loss in enumerate(pending):
            if index == len(pending) - 1:
                self.buckets.begin_last_backward()
            loss.backward()
        if not pending:
            self.buckets.begin_last_backward()
        self.buckets.end_last_backward()
        self.buckets.install()


class Mixed(nn.Module):
    """A tied weight, a frozen layer, one that is never used and one that is used on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.there = nn.Linear(3, 3, bias=False)
        self.back = nn.Linear(3, 3, bias=False)
        self.back.weight = self.there.weight
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.never = nn.Parameter(torch.ones(2))
        self.rare = nn.Linear(3, 3)

    def forward(self, x: Tensor, *, rare: bool = False) -> Tensor:
        x = self.frozen(self.back(torch.tanh(self.there(self.first(x)))))
        return (self.rare(x) if rare else x).square().mean()


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def plain_gradients(model: nn.Module, losses: Iterable[Tensor]) -> dict[str, Tensor | None]:
    model.zero_grad(set_to_none=True)
    for loss in losses:
        loss.backward()
    found = gradients(model)
    model.zero_grad(set_to_none=True)
    return found


def assert_same(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        other = found[name]
        assert (other is None) == (value is None), name
        assert value is None or (other is not None and torch.equal(other, value)), name


@pytest.mark.parametrize("bucket_bytes", [ONE_EACH, 40, 100, EVERYTHING])
@pytest.mark.parametrize("num_micro_batches", [1, 2, 3])
def test_gradients_are_what_autograd_makes_of_them(bucket_bytes: int, num_micro_batches: int) -> None:
    torch.manual_seed(0)
    model = Mixed().double()
    batches = torch.randn(num_micro_batches, 4, 3, dtype=torch.float64)
    for rare in (False, True, False):  # a step's leftovers must not show in the next
        expected = plain_gradients(model, (model(x, rare=rare) for x in batches))
        rig = Rig(model, bucket_bytes)
        rig.step(model(x, rare=rare) for x in batches)
        assert_same(gradients(model), expected)
        assert model.never.grad is None
        rig.buckets.close()


def test_many_steps_on_the_same_buckets_leave_nothing_over() -> None:
    torch.manual_seed(0)
    model = Mixed().double()
    rig = Rig(model, 100)
    for step in range(6):
        batches = torch.randn(1 + step % 3, 4, 3, dtype=torch.float64)
        rare = step % 2 == 1
        rig.step([model(x, rare=rare) for x in batches])
        found = gradients(model)
        rig.buckets.close()
        expected = plain_gradients(model, (model(x, rare=rare) for x in batches))
        assert_same(found, expected)
        rig = Rig(model, 100)


def test_a_parameter_that_skips_a_micro_batch_keeps_the_gradient_of_the_others() -> None:
    torch.manual_seed(0)
    model = Mixed().double()
    x = torch.randn(4, 3, dtype=torch.float64)
    for uses in ([True, False], [False, True], [True, False, False]):
        expected = plain_gradients(model, (model(x, rare=rare) for rare in uses))
        rig = Rig(model, ONE_EACH)
        rig.step(model(x, rare=rare) for rare in uses)
        assert_same(gradients(model), expected)
        rig.buckets.close()


def test_a_step_without_samples_sends_zeros_and_leaves_no_gradient() -> None:
    model = Mixed()
    rig = Rig(model, 100)
    rig.step([model(torch.ones(2, 3))])
    rig.sent.clear()
    rig.step([])
    assert [index for index, _ in rig.sent] == list(range(len(rig.buckets.buckets)))
    assert not any(values.any() for _, values in rig.sent)
    assert all(p.grad is None for p in model.parameters())


def test_every_bucket_leaves_once_a_step_in_the_same_order_whatever_is_used() -> None:
    model = Mixed()
    rig = Rig(model, ONE_EACH)
    for rare in (True, False, True):
        rig.sent.clear()
        rig.step([model(torch.ones(2, 3), rare=rare)])
        assert [index for index, _ in rig.sent] == list(range(len(rig.buckets.buckets)))


def test_what_leaves_is_whole_and_does_not_change_afterwards() -> None:
    model = nn.Sequential(*(nn.Linear(5, 5) for _ in range(4)))
    rig = Rig(model, ONE_EACH)
    rig.step([model(torch.randn(3, 5)).square().sum() for _ in range(2)])
    for index, values in rig.sent:
        assert torch.equal(values, rig.buckets.buckets[index].source)


def test_a_bucket_leaves_while_backward_still_runs() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1))
    rig = Rig(model, ONE_EACH)
    seen_by_first: list[int] = []
    model[0].weight.register_hook(lambda gradient: seen_by_first.append(len(rig.sent)))
    rig.step([model(torch.ones(2, 3)).sum()])
    assert seen_by_first
    assert seen_by_first[0] >= 4  # both later layers' weights and biases have left
    assert len(rig.sent) == 6


def test_nothing_leaves_before_the_last_micro_batch() -> None:
    model = nn.Linear(3, 1)
    rig = Rig(model, ONE_EACH)
    rig.buckets.begin()
    model(torch.ones(2, 3)).sum().backward()
    assert not rig.sent
    rig.buckets.begin_last_backward()
    model(torch.ones(2, 3)).sum().backward()
    assert len(rig.sent) == 2


def test_buckets_go_from_the_last_parameter_to_the_first_and_are_cut_when_full() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    rig = Rig(model, 2 * 16 * 4)
    rig.step([model(torch.ones(1, 4)).sum()])
    first, second = rig.buckets.buckets
    assert torch.equal(first.target[:16].view(4, 4), model[2].weight.grad)
    assert torch.equal(first.target[16:32].view(4, 4), model[1].weight.grad)
    assert torch.equal(second.target[:16].view(4, 4), model[0].weight.grad)


def test_a_tied_weight_has_one_place_and_a_frozen_one_none() -> None:
    model = Mixed()
    rig = Rig(model, EVERYTHING)
    ((_, num_places, _),) = rig.allocated
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names == ["never", "first.weight", "first.bias", "there.weight", "rare.weight", "rare.bias"]
    assert rig.buckets.buckets[0].num_values == 6 * 16  # each of at most 16 values of 4 bytes, aligned to 64 bytes
    assert num_places == 6 * 16 + 6 + 1  # and one flag each, and one for all


def test_each_bucket_has_one_dtype() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double(), nn.Linear(2, 2).double(), nn.Linear(2, 2))
    rig = Rig(model, EVERYTHING)
    assert [dtype for _, _, dtype in rig.allocated] == [torch.float32, torch.float64, torch.float32]


def test_flags_tell_which_parameters_have_a_gradient_here() -> None:
    model = Mixed()
    rig = Rig(model, EVERYTHING)
    rig.step([model(torch.ones(2, 3))])
    bucket = rig.buckets.buckets[0]
    # From the last parameter to the first: rare's two, there, first's two, never; and nothing is spoiled.
    assert bucket.source[bucket.num_values :].tolist() == [0, 0, 1, 1, 1, 0, 0]
    assert not rig.buckets.is_spoiled


def test_a_rank_that_cannot_go_on_marks_what_has_not_left_and_all_of_it_leaves() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    rig = Rig(model, ONE_EACH)
    rig.buckets.begin()
    rig.buckets.begin_last_backward()
    hidden = model[1](model[0](torch.ones(1, 2)))
    hidden.register_hook(_refuse)
    with pytest.raises(MemoryError):
        model[2](hidden).sum().backward()
    rig.buckets.spoil()
    rig.buckets.end_last_backward()
    assert [index for index, _ in rig.sent] == [0, 1, 2, 3]
    assert [values[-1].item() for _, values in rig.sent] == [0, 0, 1, 1], "the last layer's had left"
    assert rig.buckets.is_spoiled
    rig.step([model(torch.ones(1, 2)).sum()])
    assert not rig.buckets.is_spoiled


def test_a_gradient_that_had_left_as_a_whole_is_not_spoiled() -> None:
    model = nn.Linear(2, 1)
    rig = Rig(model, EVERYTHING)
    rig.buckets.begin()
    rig.buckets.begin_last_backward()
    model(torch.ones(1, 2)).sum().backward()
    rig.buckets.spoil()
    rig.buckets.end_last_backward()
    assert not rig.buckets.is_spoiled


def _refuse(_: Tensor) -> None:
    raise MemoryError


def test_a_gradient_that_only_another_rank_has_is_installed_here_too() -> None:
    model = Mixed()
    rig = Rig(model, EVERYTHING)
    rig.buckets.begin()
    rig.buckets.begin_last_backward()
    rig.buckets.end_last_backward()
    rig.buckets.buckets[0].target.fill_(3.0)  # what the exchange would have brought
    rig.buckets.install()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
        assert p.grad is None or torch.all(p.grad == 3.0)


def test_gradients_are_views_of_the_buckets() -> None:
    model = nn.Linear(3, 2)
    rig = Rig(model, EVERYTHING)
    rig.step([model(torch.ones(2, 3)).sum()])
    start = rig.buckets.buckets[0].target.data_ptr()
    size = rig.buckets.buckets[0].target.numel() * 4
    for p in model.parameters():
        assert p.grad is not None
        assert start <= p.grad.data_ptr() < start + size


def test_memory_formats_and_empty_parameters_make_no_difference() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)).to(memory_format=torch.channels_last)
    model.register_parameter("empty", nn.Parameter(torch.empty(0, 5)))
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    expected = plain_gradients(model, [model(x).square().sum() + model.empty.sum() for _ in range(2)])
    for bucket_bytes in (ONE_EACH, EVERYTHING):
        rig = Rig(model, bucket_bytes)
        rig.step([model(x).square().sum() + model.empty.sum() for _ in range(2)])
        assert_same(gradients(model), expected)
        rig.buckets.close()


def test_a_sparse_gradient_is_refused_by_name() -> None:
    model = nn.Embedding(5, 3, sparse=True)
    rig = Rig(model, EVERYTHING)
    with pytest.raises(JobError, match=r"the gradient of weight is sparse.*sparse=False"):
        rig.step([model(torch.tensor([1, 2])).sum()])


class Reentrant(nn.Module):
    """One layer used twice, each time under reentrant checkpointing: its gradient comes in two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = checkpoint(self.layer, x, use_reentrant=True)
        return x.sum()


def test_a_gradient_that_comes_twice_in_one_backward_is_refused_by_name() -> None:
    model = Reentrant()
    rig = Rig(model, EVERYTHING)
    with pytest.raises(JobError, match=r"gradient of layer.*came twice.*use_reentrant=False"):
        rig.step([model(torch.ones(2, 3, requires_grad=True))])


def test_closed_buckets_let_go_of_the_parameters() -> None:
    model = nn.Linear(3, 1)
    rig = Rig(model, ONE_EACH)
    rig.buckets.close()
    model(torch.ones(2, 3)).sum().backward()
    assert not rig.sent
    assert model.weight.grad is not None
