"""The audit: it finds what was left out and what was taken twice, and only the work that lasted counts."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import pytest
from event_logs import event, started, step, training

from shoal.dashboard.audit import audit
from shoal.events import Event

SIZE, BATCH = 10, 4  # so an epoch is three batches: 4, 4 and 2


def view(t: float, epoch: int, seats: Sequence[int], start: int) -> list[Event]:
    """The `view` events of all its members."""
    return [event(t, f"rank-{seat}", "view", epoch=epoch, seats=list(seats), step=start) for seat in seats]


def taken(t: float, number: int, seats: Sequence[int], size: int = SIZE) -> list[Event]:
    """One step as the loader would divide it, told by `seats`."""
    epoch, place = divmod(number - 1, -(-size // BATCH))
    first = place * BATCH
    samples = min(BATCH, size - first)
    shares = [samples * (i + 1) // len(seats) - samples * i // len(seats) for i in range(len(seats))]
    return [
        step(t, seat, number, epoch=epoch, first=first, samples=samples, share=share)
        for seat, share in zip(seats, shares, strict=True)
    ]


def steps(numbers: Sequence[int], seats: Sequence[int], t: float = 0.0) -> list[Event]:
    """Several steps, one a second."""
    return [told for number in numbers for told in taken(t + number, number, seats)]


def test_a_run_without_views_is_clean() -> None:
    events = [started(0.0, rank, 2) for rank in range(2)] + steps(range(1, 10), [0, 1])
    assert audit(events).is_clean
    assert audit(events).epochs == 3


def test_an_epoch_under_way_is_not_looked_at() -> None:
    assert audit(steps(range(1, 6), [0])).epochs == 1
    assert audit(steps(range(1, 6), [0])).is_clean


def test_nothing_is_found_in_an_empty_log() -> None:
    assert audit([]).epochs == 0
    assert audit([]).is_clean


def test_a_step_left_out_is_missed() -> None:
    found = audit(steps([1, 3, 4, 5, 6], [0, 1]))
    assert found.missing == {0: [(4, 8)]}
    assert not found.twice


def test_the_end_of_an_epoch_is_missed_by_comparison_with_others() -> None:
    assert audit(steps([1, 2, 4, 5, 6], [0])).missing == {0: [(8, 10)]}


def test_the_number_of_samples_can_be_told() -> None:
    assert audit(steps([1, 2, 4], [0]), samples=SIZE).missing == {0: [(8, 10)]}


def test_an_epoch_of_which_nothing_was_taken_is_missed() -> None:
    assert audit(steps([1, 2, 3, 7, 8, 9], [0])).missing == {1: [(0, 10)]}


def test_positions_taken_twice_are_found() -> None:
    again = step(9.0, 0, 4, epoch=0, first=2, samples=4, share=4)
    assert audit([*steps([1, 2, 3], [0]), again]).twice == {0: [(2, 4), (4, 6)]}


def test_a_step_that_only_the_lost_member_committed_is_taken_again_and_counts_once() -> None:
    before = view(0.0, 1, [0, 1], 0) + steps([1, 2], [0, 1]) + taken(3.0, 3, [0, 1])[1:]
    after = view(4.0, 2, [0], 2) + steps(range(3, 7), [0], t=4.0)
    assert audit(before + after).is_clean


def test_a_step_that_one_survivor_committed_stays() -> None:
    before = view(0.0, 1, [0, 1, 2], 0) + steps([1], [0, 1, 2]) + taken(2.0, 2, [0, 1, 2])[:1]
    after = view(4.0, 2, [0, 1], 2) + steps(range(3, 7), [0, 1], t=4.0)
    assert audit(before + after).is_clean


def test_a_step_left_out_between_views_is_missed() -> None:
    before = view(0.0, 1, [0, 1], 0) + steps([1], [0, 1])
    after = view(4.0, 2, [0], 2) + steps(range(3, 7), [0], t=4.0)
    assert audit(before + after).missing == {0: [(4, 8)]}


def test_an_attempt_that_goes_on_from_an_older_checkpoint_undoes_what_came_after_it() -> None:
    first = view(0.0, 1, [0, 1], 0)
    first += [started(0.5, rank, 2, attempt="a") for rank in range(2)] + steps(range(1, 6), [0, 1])
    second = view(20.0, 1, [0, 1], 2)
    second += [started(20.5, rank, 2, attempt="b") for rank in range(2)] + steps(range(3, 7), [0, 1], t=20.0)
    assert audit(first + second).is_clean
    assert audit(first + second).epochs == 2
    stopped_early = [e for e in first + second if e["kind"] != "step" or e["t"] < 20 or e["step"] <= 4]
    assert audit(stopped_early, samples=SIZE).epochs == 1  # step 5 of the first attempt is gone


def test_an_attempt_without_views_undoes_what_came_after_its_first_step() -> None:
    first = [started(0.0, 0, 1, attempt="a"), *steps(range(1, 6), [0])]
    second = [started(20.0, 0, 1, attempt="b"), *steps(range(3, 7), [0], t=20.0)]
    assert audit(first + second).is_clean


def test_ranks_of_one_view_that_tell_different_batches_are_disputed() -> None:
    events = view(0.0, 1, [0, 1], 0) + steps([1, 2, 3], [0, 1])
    events[-1] = {**events[-1], "first": 4}
    assert audit(events).disputed == (3,)


def test_shares_that_do_not_make_up_the_batch_are_disputed() -> None:
    events = view(0.0, 1, [0, 1], 0) + steps([1, 2, 3], [0, 1])
    events[-1] = {**events[-1], "share": 2}
    assert audit(events).disputed == (3,)


def test_the_synthetic_training_of_other_tests_can_be_read() -> None:
    events = [e | {"first": (e["step"] - 1) % 100 * 64} if e["kind"] == "step" else e for e in training(1, 30)]
    assert not audit(events).disputed


@pytest.mark.parametrize("seed", range(20))
def test_losses_of_members_at_any_moment_leave_it_clean(seed: int) -> None:
    dice = random.Random(seed)
    events, step_number, t = [], 0, 0.0
    for epoch in range(1, 8):
        seats = sorted(dice.sample(range(5), dice.randint(1, 4)))
        events += view(t, epoch, seats, step_number)
        for _ in range(dice.randint(0, 5)):
            t += 1.0
            step_number += 1
            events += taken(t, step_number, seats)
        t += 1.0
        torn = taken(t, step_number + 1, seats)
        told = dice.sample(torn, dice.randint(0, len(torn)))
        events += told
        if told and dice.random() < 0.5:  # a survivor was among those who committed it
            step_number += 1
    events += view(t + 1, 8, [0], step_number) + steps(range(step_number + 1, step_number + 4), [0], t=t)
    assert audit(sorted(events, key=lambda e: e["t"])).is_clean
    assert audit(events).epochs >= 1


def test_a_long_stay_in_one_view_is_read_as_fast_as_many_short_ones() -> None:
    seats, num_steps = [0, 1], 15_000
    events = view(0.0, 1, seats, 0) + steps(range(1, num_steps + 1), seats)
    began = time.perf_counter()
    assert audit(events).epochs == num_steps // 3
    assert time.perf_counter() - began < 10  # looking at all steps for each of them takes minutes
