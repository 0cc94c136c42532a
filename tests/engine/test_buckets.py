"""Gradients leave in a fixed order as soon as they are complete, and come back as if one process had made them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shoal.engine.buckets import GradientBuckets
from shoal.errors import JobError
from shoal.strategy.bucket import Bucket
from shoal.wire.transport import Memory, private_memory

CPU = torch.device("cpu")
HUGE, TINY = 2**30, 1


class Rank:
    """One rank: its buckets, what was allocated, and which buckets it has sent so far."""

    def __init__(self, model: nn.Module, bucket_bytes: int = HUGE) -> None:
        self.model = model
        self.allocated: list[tuple[int, int, torch.dtype]] = []
        self.sent: list[int] = []
        self.buckets = GradientBuckets(model.named_parameters(), bucket_bytes, self._allocate, self._send)

    def _allocate(self, index: int, num_values: int, dtype: torch.dtype) -> Memory:
        self.allocated.append((index, num_values, dtype))
        return private_memory(num_values, dtype, CPU)

    def _send(self, index: int, bucket: Bucket) -> None:
        assert bucket is self.buckets.buckets[index]
        self.sent.append(index)

    def step(self, *losses: Callable[[], Tensor]) -> None:
        """One step's backward passes; the exchange is left to the caller."""
        self.sent.clear()
        self.buckets.begin()
        for number, loss in enumerate(losses):
            if number == len(losses) - 1:
                self.buckets.begin_last_backward()
            loss().backward()
        if not losses:
            self.buckets.begin_last_backward()
        self.buckets.end_last_backward()


def exchange(ranks: list[Rank]) -> None:
    """Sum every bucket over the ranks, flags included, and install."""
    for same in zip(*(rank.buckets.buckets for rank in ranks), strict=True):
        total = torch.stack([bucket.source for bucket in same]).sum(dim=0)
        for bucket in same:
            bucket.target.copy_(total)
    for rank in ranks:
        rank.buckets.install()


def chain(num_layers: int = 3, width: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(num_layers))).double()


def loss_of(model: nn.Module, seed: int = 0, width: int = 4) -> Callable[[], Tensor]:
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return lambda: model(x).square().mean()


def plain_gradients(model: nn.Module, *losses: Callable[[], Tensor]) -> list[Tensor | None]:
    model.zero_grad(set_to_none=True)
    for loss in losses:
        loss().backward()
    found = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("bucket_bytes", [TINY, 200, HUGE])
@pytest.mark.parametrize("num_micro_batches", [1, 2, 3])
def test_one_rank_gets_exactly_what_plain_backward_gives(bucket_bytes: int, num_micro_batches: int) -> None:
    model = chain()
    losses = [loss_of(model, seed) for seed in range(num_micro_batches)]
    expected = plain_gradients(model, *losses)
    rank = Rank(model, bucket_bytes)
    for _ in range(2):  # the second step starts afresh
        rank.step(*losses)
        exchange([rank])
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            assert gradient is not None
            assert torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_several_ranks_get_the_sum(num_ranks: int) -> None:
    ranks = [Rank(chain(), 200) for _ in range(num_ranks)]
    losses = [loss_of(rank.model, seed) for seed, rank in enumerate(ranks)]
    singles = [plain_gradients(rank.model, loss) for rank, loss in zip(ranks, losses, strict=True)]
    for rank, loss in zip(ranks, losses, strict=True):
        rank.step(loss)
    exchange(ranks)
    for rank in ranks:
        for place, parameter in enumerate(rank.model.parameters()):
            expected = torch.stack([single[place] for single in singles]).sum(dim=0)
            assert torch.equal(parameter.grad, expected)


def test_the_last_layers_come_first() -> None:
    rank = Rank(chain(), TINY)
    order = [next(iter(slots)).name for slots in rank.buckets._slots_of]
    assert order == ["2.weight", "1.weight", "0.weight"]
    assert [index for index, _, _ in rank.allocated] == [0, 1, 2]


@pytest.mark.parametrize(("bucket_bytes", "expected"), [(TINY, 4), (128, 4), (129, 2), (HUGE, 1)])
def test_a_bucket_is_closed_when_it_is_full(bucket_bytes: int, expected: int) -> None:
    assert len(Rank(chain(4), bucket_bytes).buckets.buckets) == expected  # each layer: 16 values, 128 bytes


def test_a_bucket_leaves_during_backward_as_soon_as_it_is_full() -> None:
    model = chain()
    rank = Rank(model, TINY)
    seen: dict[str, list[int]] = {}
    for name, p in model.named_parameters():  # these hooks run after the buckets' own
        p.register_post_accumulate_grad_hook(lambda _, name=name: seen.update({name: list(rank.sent)}))
    rank.step(loss_of(model))
    assert seen == {"2.weight": [0], "1.weight": [0, 1], "0.weight": [0, 1, 2]}
    assert rank.sent == [0, 1, 2]


def test_nothing_leaves_before_the_last_micro_batch() -> None:
    model = chain()
    rank = Rank(model, TINY)
    rank.buckets.begin()
    loss_of(model)().backward()
    assert rank.sent == []
    rank.buckets.begin_last_backward()
    assert rank.sent == []


class Backwards(nn.Module):
    """Its first parameter is used last: gradients come in the wrong order."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Parameter(torch.tensor(2.0))
        self.early = nn.Parameter(torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.early) * self.late


def test_buckets_leave_in_order_even_if_they_fill_in_another() -> None:
    rank = Rank(Backwards(), TINY)
    rank.step(lambda: rank.model(torch.tensor(1.0)))
    assert rank.sent == [0, 1]


def test_without_a_micro_batch_everything_is_sent_as_zeros() -> None:
    model = chain()
    rank = Rank(model, TINY)
    rank.step(loss_of(model))  # leaves values behind
    rank.step()
    assert rank.sent == [0, 1, 2]
    for bucket in rank.buckets.buckets:
        assert not bucket.source.any()


class TwoHeads(nn.Module):
    """A sample takes one head or the other; nobody ever takes the third."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(2, 1) for _ in range(3))


def head_loss(model: nn.Module, head: int) -> Callable[[], Tensor]:
    return lambda: model.heads[head](torch.ones(1, 2)).sum()


@pytest.mark.parametrize("bucket_bytes", [TINY, 20, HUGE])
def test_a_parameter_counts_if_any_rank_uses_it_and_stays_none_if_no_rank_does(bucket_bytes: int) -> None:
    ranks = [Rank(TwoHeads(), bucket_bytes) for _ in range(3)]
    for _ in range(2):
        ranks[0].step(head_loss(ranks[0].model, 0))
        ranks[1].step(head_loss(ranks[1].model, 1), head_loss(ranks[1].model, 1))
        ranks[2].step()
        exchange(ranks)
        for rank in ranks:
            heads = rank.model.heads
            assert heads[0].weight.grad.tolist() == [[1.0, 1.0]]
            assert heads[1].weight.grad.tolist() == [[2.0, 2.0]]
            assert heads[2].weight.grad is None
            assert heads[2].bias.grad is None


def test_a_gradient_of_zeros_is_not_no_gradient() -> None:
    rank = Rank(TwoHeads())
    rank.step(lambda: head_loss(rank.model, 0)() * 0.0)
    exchange([rank])
    assert rank.model.heads[0].weight.grad.tolist() == [[0.0, 0.0]]
    assert rank.model.heads[1].weight.grad is None


def test_flags_say_which_parameters_have_a_gradient_and_are_not_values() -> None:
    rank = Rank(TwoHeads())
    rank.step(head_loss(rank.model, 1))
    (bucket,) = rank.buckets.buckets
    assert bucket.source[bucket.num_values :].tolist() == [0, 0, 1, 1, 0, 0]
    assert bucket.portion == slice(0, bucket.num_values)


def test_what_no_rank_used_last_time_may_be_used_next_time() -> None:
    rank = Rank(TwoHeads())
    for head in (0, 1, 2, 0):
        rank.step(head_loss(rank.model, head))
        exchange([rank])
        used = [h.weight.grad is not None for h in rank.model.heads]
        assert used == [number == head for number in range(3)]


def test_micro_batches_add_in_place() -> None:
    model = chain(1)
    rank = Rank(model)
    (slot,) = rank.buckets._slots
    rank.buckets.begin()
    for number in range(3):
        loss_of(model, number)().backward()
        assert model[0].weight.grad is slot.source
    assert slot.source.data_ptr() == rank.buckets.buckets[0].source.data_ptr()


def test_tied_parameters_have_one_place_and_their_full_gradient() -> None:
    model = chain(3)
    model[2].weight = model[0].weight
    expected = plain_gradients(model, loss_of(model))
    rank = Rank(model)
    assert len(rank.buckets._slots) == 2
    rank.step(loss_of(model))
    exchange([rank])
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("bucket_bytes", [TINY, HUGE])
def test_a_shared_layer_in_two_checkpointed_segments_is_summed_whole_or_refused(
    use_reentrant: bool, bucket_bytes: int
) -> None:
    model = chain(2)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)

    def loss() -> Tensor:
        y = checkpoint(model[0], x, use_reentrant=use_reentrant)
        y = checkpoint(model[0], y.tanh(), use_reentrant=use_reentrant)
        return (model[1](y) ** 2).mean()

    expected = plain_gradients(model, loss)
    rank = Rank(model, bucket_bytes)
    leaving: dict[int, Tensor] = {}
    keep = rank.buckets._send
    rank.buckets._send = lambda index, bucket: (leaving.update({index: bucket.source.clone()}), keep(index, bucket))
    try:
        rank.step(loss)
    except JobError:
        return
    for index, source in leaving.items():
        rank.buckets.buckets[index].target.copy_(source)  # what left is what counts
    rank.buckets.install()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))


def test_frozen_parameters_are_passed_over() -> None:
    model = chain(3)
    model[1].weight.requires_grad_(False)
    rank = Rank(model)
    rank.step(loss_of(model))
    exchange([rank])
    assert [p.grad is not None for p in model.parameters()] == [True, False, True]
    assert len(rank.buckets._slots) == 2


def test_a_sparse_gradient_is_refused_by_name() -> None:
    rank = Rank(nn.Sequential(nn.Embedding(5, 3, sparse=True)))
    with pytest.raises(JobError, match=r"the gradient of 0\.weight is sparse .*sparse=False"):
        rank.step(lambda: rank.model(torch.tensor([1, 2])).sum())


@pytest.mark.parametrize("bucket_bytes", [TINY, HUGE])
def test_dtypes_never_share_a_bucket(bucket_bytes: int) -> None:
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float32, torch.float32]
    model = nn.ParameterList(nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in dtypes)
    rank = Rank(model, bucket_bytes)
    for slot in rank.buckets._slots:
        assert rank.allocated[slot.bucket][2] == slot.parameter.dtype == slot.source.dtype
    assert len(rank.buckets.buckets) == (5 if bucket_bytes == TINY else 4)
    rank.step(lambda: sum((i + 1) * p.double().sum() for i, p in enumerate(model)))
    exchange([rank])
    for number, parameter in enumerate(model):
        assert parameter.grad.dtype == parameter.dtype
        assert parameter.grad.tolist() == [number + 1.0] * 3


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (7,), (2, 3, 5), (97,)])
def test_a_gradient_has_its_parameters_shape_whatever_that_is(shape: tuple[int, ...]) -> None:
    model = nn.ParameterList([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(shape))])
    rank = Rank(model)
    rank.step(lambda: 2 * model[1].sum() + model[0].sum())
    exchange([rank])
    assert model[1].grad.shape == shape
    assert torch.equal(model[1].grad, torch.full(shape, 2.0))


def test_a_parameter_that_does_not_lie_in_order_gets_its_gradient() -> None:
    weight = nn.Parameter(torch.arange(6.0).view(2, 3).t())
    model = nn.ParameterList([weight])
    factors = torch.arange(6.0).view(3, 2)
    rank = Rank(model)
    rank.step(lambda: (factors * weight).sum(), lambda: (factors * weight).sum())
    exchange([rank])
    assert torch.equal(weight.grad, 2 * factors)


def test_every_place_starts_on_a_cache_line_and_none_overlap() -> None:
    sizes = [1, 3, 16, 17, 5, 0, 97]
    rank = Rank(nn.ParameterList(nn.Parameter(torch.ones(size)) for size in sizes))
    (bucket,) = rank.buckets.buckets
    starts = [slot.source.storage_offset() for slot in rank.buckets._slots if slot.source.numel()]
    assert all(start * 4 % 64 == 0 for start in starts)
    for number, slot in enumerate(rank.buckets._slots):
        slot.source.fill_(number + 1)
    filled = [int((bucket.source == number + 1).sum()) for number in range(len(sizes))]
    assert filled == list(reversed(sizes))


def test_closing_takes_the_hooks_off() -> None:
    model = chain(1)
    rank = Rank(model)
    rank.buckets.close()
    rank.buckets.begin_last_backward()
    loss_of(model)().backward()
    assert rank.sent == []
    assert not rank.buckets.buckets[0].source.any()
