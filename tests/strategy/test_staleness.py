"""Staleness: nothing lost, nothing twice, nobody too far ahead, in any interleaving."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.strategy.sync.staleness import Answer, Apply, Duplicate, Hold, Mode, Refuse, Staleness, UpdateId

STEPS = 4


class Play:
    """Workers that pull, then push, each at its own pace, against one machine; updates may come several times."""

    def __init__(self, mode: Mode, num_workers: int, bound: int) -> None:
        self.machine = Staleness(mode, range(num_workers), bound=bound)
        self.mode, self.bound, self.num_workers = mode, bound, num_workers
        self.clock = dict.fromkeys(range(num_workers), 0)
        self.may_push = dict.fromkeys(range(num_workers), False)
        self.asked = dict.fromkeys(range(num_workers), False)
        self.applied: Counter[UpdateId] = Counter()
        self.applications: list[tuple[UpdateId, ...]] = []

    def move(self, worker: int) -> bool:
        """One move of this worker; False if it can do nothing."""
        if self.may_push[worker]:
            self.may_push[worker] = self.asked[worker] = False
            sequence = clock = self.clock[worker]
            self.clock[worker] += 1
            self.obey(self.machine.update_came(worker, sequence, clock))
            return True
        if not self.asked[worker] and self.clock[worker] < STEPS:
            self.asked[worker] = True
            self.obey(self.machine.pull_came(self.clock[worker], worker))
            return True
        return False

    def repeat(self, worker: int) -> None:
        if self.clock[worker]:
            last = self.clock[worker] - 1
            answer = self.machine.update_came(worker, last, last)
            assert answer == [Duplicate(UpdateId(worker, last))]

    def obey(self, instructions: list[Any]) -> None:
        for instruction in instructions:
            match instruction:
                case Apply(updates):
                    self.applied.update(updates)
                    self.applications.append(updates)
                case Answer(worker):
                    self.check_fresh(worker)
                    self.may_push[worker] = True
                case _:
                    assert isinstance(instruction, Hold)

    def check_fresh(self, worker: int) -> None:
        clock = self.clock[worker]
        done = [sum(self.applied[UpdateId(w, c)] for c in range(STEPS)) for w in range(self.num_workers)]
        if self.mode == "bsp":
            assert done == [clock] * self.num_workers
        if self.mode == "ssp":
            assert min(done) >= clock - self.bound


@given(
    mode=st.sampled_from(["bsp", "ssp", "async"]),
    num_workers=st.integers(1, 4),
    bound=st.integers(0, 3),
    moves=st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=60),
)
def test_every_update_counts_once_and_no_read_is_too_stale(
    mode: Mode, num_workers: int, bound: int, moves: list[tuple[int, bool]]
) -> None:
    play = Play(mode, num_workers, bound)
    for worker, again in moves:
        if again:
            play.repeat(worker % num_workers)
        play.move(worker % num_workers)
    while sum(play.move(worker) for worker in range(num_workers)):
        pass
    assert play.machine.num_waiting == 0, "somebody waits for ever"
    assert play.applied == {UpdateId(w, c): 1 for w in range(num_workers) for c in range(STEPS)}
    if mode == "bsp":
        assert play.applications == [tuple(UpdateId(w, c) for w in range(num_workers)) for c in range(STEPS)]


def test_bsp_and_ssp_wait_no_more_for_who_has_left() -> None:
    for mode in ("bsp", "ssp"):
        machine = Staleness(mode, [0, 1])
        machine.update_came(0, 1, 0)
        assert machine.pull_came(1, "token") == []
        assert machine.worker_left(1)[-1] == Answer("token")


@pytest.mark.parametrize("mode", ["bsp", "ssp"])
def test_what_a_lost_worker_did_not_bring_another_brings_in_its_name_and_nothing_counts_twice(mode: Mode) -> None:
    brought, missing = Staleness(mode, [0, 1], bound=1), Staleness(mode, [0, 1], bound=1)
    brought.update_came(1, 1, 0)
    for machine in (brought, missing):
        machine.update_came(0, 1, 0)
    assert brought.update_came(1, 9, 0, in_name=True) == [Duplicate(UpdateId(1, 9))]
    assert any(isinstance(answer, Apply) for answer in missing.update_came(1, 9, 0, in_name=True))
    assert brought.clocks == missing.clocks == {0: 1, 1: 1}


@pytest.mark.parametrize("mode", ["bsp", "ssp"])
def test_after_a_change_only_the_new_members_are_waited_for(mode: Mode) -> None:
    machine = Staleness(mode, [0, 1])
    machine.update_came(0, 1, 0)
    machine.update_came(1, 1, 0)
    assert machine.pull_came(2, "of the old view") == []
    machine.members_changed([0, 7], 1)
    assert isinstance(machine.update_came(1, 2, 1)[0], Refuse)
    machine.update_came(0, 2, 1)
    assert machine.pull_came(2, "token") == []
    assert machine.update_came(7, 1, 1)[-1] == Answer("token")


def test_an_update_out_of_its_turn_is_refused() -> None:
    machine = Staleness("bsp", [0], start_clock=5)
    assert isinstance(machine.update_came(0, 1, 4)[0], Refuse)
    assert isinstance(machine.update_came(7, 1, 5)[0], Refuse)
    assert machine.update_came(0, 2, 5) == [Hold(UpdateId(0, 2)), Apply((UpdateId(0, 2),))]


def test_what_cannot_come_again_is_forgotten() -> None:
    machine = Staleness("async", [])
    for sequence in range(1000):
        machine.update_came(0, sequence, sequence, oldest=sequence)
    assert len(machine._seen[0].above) == 1
    assert machine.update_came(0, 3, 3) == [Duplicate(UpdateId(0, 3))]


@pytest.mark.parametrize("clocks", [[0, 1, 2], [2, 0, 1]])
def test_ssp_counts_what_is_applied_in_any_order(clocks: list[int]) -> None:
    machine = Staleness("ssp", [0], bound=0)
    for clock in clocks[:-1]:
        machine.update_came(0, clock, clock)
    assert machine.pull_came(3, "token") == []
    assert machine.update_came(0, clocks[-1], clocks[-1])[-1] == Answer("token")
