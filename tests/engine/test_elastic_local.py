"""Local steps through losses and arrivals, held against plain PyTorch: as many models, averaged by hand.

What the reference is told of a run: who was there in which view, how many steps each seat had done when it ended, and
how many rounds of each fragment somebody had merged by then. All else it works out by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from elastic_runs import Chapter, assert_every_sample_once_or_told_as_lost, chapters, events, faults, plan
from replicas import TARGET, Replica, copied, fragments_of, samples_of
from seen_runs import calm_and_struck
from torch import Tensor
from torch.optim import SGD

from command_line import train, train_until_joined, training
from shoal.run import Run
from training_runs import final_state


@dataclass(frozen=True)
class Setup:
    """One way to train locally."""

    every: int = 4
    fragments: int = 1
    overlap: int = 0
    outer_lr: float = 1.0
    outer_momentum: float = 0.0
    merge: str = "carry"

    @property
    def sync(self) -> str:
        return f"""
            kind = "local"
            every = {self.every}
            fragments = {self.fragments}
            overlap = {self.overlap}
            outer_lr = {self.outer_lr}
            outer_momentum = {self.outer_momentum}
            merge = "{self.merge}"
            bucket_mb = 0.0003
        """

    def leaving(self, step: int) -> list[int]:
        return [f for f in range(self.fragments) if step > 0 and (step - self.offset(f)) % self.every == 0]

    def offset(self, fragment: int) -> int:
        return (fragment + 1) * self.every // self.fragments


@dataclass
class Flying:
    """A fragment of one seat on its way: the number of its round, the values that left, the steps that count in it."""

    number: int
    sent: list[Tensor]
    steps: list[int]


@dataclass
class Seat:
    """One worker. Lists have one entry for each fragment; `steps`: counted from 1, since it left; `sizes`: of each."""

    replica: Replica
    steps: list[list[int]]
    flying: dict[int, Flying] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)

    def train(self, step: int, rank: int, size: int) -> None:
        samples = samples_of(step - 1, (1.0,) * size)[rank]
        self.replica.gradient(samples)
        self.replica.update()
        self.sizes[step] = len(samples)
        for counted in self.steps:
            counted.append(step)

    def held(self, fragment: int) -> list[int]:
        """The steps of which no merged round knows."""
        flying = self.flying.get(fragment)
        return [*(flying.steps if flying else []), *self.steps[fragment]]


class Reference:
    """All workers of a run, and the anchors: after each round of each fragment."""

    def __init__(self, setup: Setup, seats: list[int]) -> None:
        self.setup = setup
        first = Replica(0)
        self.members = fragments_of(tuple(p.numel() * 8 for p in first.parameters), setup.fragments)
        self.seats = {seat: Seat(Replica(seat), [[] for _ in self.members]) for seat in seats}
        self.outer = [p.detach().clone().requires_grad_() for p in first.parameters]
        self.optimizers = [
            SGD([p], setup.outer_lr, momentum=setup.outer_momentum, nesterov=setup.outer_momentum > 0)
            for p in self.outer
        ]
        self.anchors = [[self._now(fragment)] for fragment in range(len(self.members))]
        self.lost: dict[int, tuple[int, int]] = {}  # seat -> (the first step that is lost, how many samples)

    def chapter(self, chapter: Chapter, following: Chapter | None, merged: list[float]) -> None:
        """One view. `merged`: of each fragment, the rounds that anybody had merged when it ended."""
        cut = following is not None and not following.planned
        keeping = [s for s in following.seats if s not in following.took] if following else chapter.seats
        last = following.start if following else max(chapter.done.values())
        self.steps(chapter, keeping, merged, last)
        averaging = {seat: self.seats[seat] for seat in (keeping if cut else chapter.seats)}
        self._merge(list(range(len(self.members))), averaging, merged)
        for seat in chapter.seats:
            if cut and seat not in keeping:
                self._lose(seat, merged, last)
        if not cut:
            self._average(chapter.seats)
        for seat in keeping:
            worker = self.seats[seat]
            worker.steps = [worker.held(fragment) for fragment in range(len(self.members))]
            worker.flying.clear()
            for step in range(chapter.done[seat] + 1, last + 1):
                worker.train(step, chapter.seats.index(seat), len(chapter.seats))
        if following:
            self.enter(following, max(keeping, key=lambda seat: (chapter.done[seat], -seat)))

    def steps(self, chapter: Chapter, keeping: list[int], merged: list[float], last: int) -> None:
        """All steps of a view, of those who `keep` on only what they had done by its end."""
        for step in range(chapter.start + 1, last + 1):
            acting = {s: self.seats[s] for s in chapter.seats if s not in keeping or chapter.done[s] >= step}
            for seat, worker in acting.items():
                worker.train(step, chapter.seats.index(seat), len(chapter.seats))
            if self.setup.overlap:
                self._merge(self.setup.leaving(step - self.setup.overlap), acting, merged)
            self._leave(self.setup.leaving(step), acting, merged, complete=len(acting) == len(chapter.seats))
            if not self.setup.overlap:
                self._merge(self.setup.leaving(step), acting, merged)

    def enter(self, view: Chapter, teller: int) -> None:
        """Who takes a state takes the anchors, and the optimizer of seat `teller`."""
        source = self.seats[teller].replica
        for seat in view.took:
            self.seats[seat] = Seat(copied(source), [[] for _ in self.members])
            for fragment in range(len(self.members)):
                self._put(self.seats[seat], fragment, self.anchors[fragment][-1])
        self.seats = {seat: self.seats[seat] for seat in view.seats}

    def _leave(self, fragments: list[int], acting: dict[int, Seat], merged: list[float], *, complete: bool) -> None:
        for fragment in fragments:
            number = len(self.anchors[fragment])
            for worker in acting.values():
                if fragment in worker.flying:
                    continue  # the round before broke, and this rank waits for it
                worker.flying[fragment] = Flying(number, self._values(worker, fragment), worker.steps[fragment])
                worker.steps[fragment] = []
            if number <= merged[fragment]:
                assert complete, "somebody merged a round in which not all took part"
                self._outer_step(fragment, list(acting.values()))

    def _outer_step(self, fragment: int, workers: list[Seat]) -> None:
        means = self._mean_differences(fragment, [worker.flying[fragment] for worker in workers], workers)
        for index, mean in zip(self.members[fragment], means, strict=True):
            self.outer[index].grad = mean
            self.optimizers[index].step()
        self.anchors[fragment].append(self._now(fragment))

    def _mean_differences(self, fragment: int, flying: list[Flying], workers: list[Seat]) -> list[Tensor]:
        counts = [sum(w.sizes[step] for step in f.steps) for f, w in zip(flying, workers, strict=True)]
        return [
            sum(
                (count / max(sum(counts), 1) * (old - f.sent[k]) for count, f in zip(counts, flying, strict=True)),
                torch.zeros_like(old),
            )
            for k, old in enumerate(self.anchors[fragment][-1])
        ]

    def _merge(self, fragments: list[int], acting: dict[int, Seat], merged: list[float]) -> None:
        for fragment in fragments:
            for worker in acting.values():
                flying = worker.flying.get(fragment)
                if flying is None or flying.number > merged[fragment]:
                    continue
                del worker.flying[fragment]
                anchor, now = self.anchors[fragment][flying.number], self._values(worker, fragment)
                if self.setup.overlap == 0:
                    now = anchor
                elif self.setup.merge == "carry":
                    now = [a + (n - s) for a, n, s in zip(anchor, now, flying.sent, strict=True)]
                else:
                    now = [(a + n) / 2 for a, n in zip(anchor, now, strict=True)]
                self._put(worker, fragment, now)

    def _average(self, seats: list[int]) -> None:
        """Everything once more, without momentum."""
        workers = [self.seats[seat] for seat in seats]
        for fragment, members in enumerate(self.members):
            flying = [Flying(0, self._values(w, fragment), w.steps[fragment]) for w in workers]
            for index, mean in zip(members, self._mean_differences(fragment, flying, workers), strict=True):
                self.outer[index].data.sub_(mean)
            self.anchors[fragment].append(self._now(fragment))
            for worker in workers:
                self._put(worker, fragment, self.anchors[fragment][-1])
                worker.steps[fragment] = []

    def _lose(self, seat: int, merged: list[float], last: int) -> None:
        worker = self.seats[seat]
        for fragment, flying in list(worker.flying.items()):
            if flying.number <= merged[fragment]:
                del worker.flying[fragment]
        steps = min((worker.held(f) for f in range(len(self.members))), key=lambda held: held[0] if held else math.inf)
        assert not steps or steps == list(range(steps[0], last + 1))
        if steps:
            self.lost[seat] = (steps[0], sum(worker.sizes[step] for step in steps))

    def _now(self, fragment: int) -> list[Tensor]:
        return [self.outer[index].detach().clone() for index in self.members[fragment]]

    def _values(self, worker: Seat, fragment: int) -> list[Tensor]:
        return [worker.replica.parameters[index].detach().clone() for index in self.members[fragment]]

    def _put(self, worker: Seat, fragment: int, values: list[Tensor]) -> None:
        for index, value in zip(self.members[fragment], values, strict=True):
            worker.replica.parameters[index].data.copy_(value)


def merged_by_anybody(run: Run, view: Chapter) -> list[float]:
    """Of each fragment, the rounds that one of those who went on from `view` had merged when it ended."""
    told = [event["merged"] for event in events(run, "rounds") if event["epoch"] == view.epoch]
    return [float(max(numbers)) for numbers in zip(*told, strict=True)]


def hold_against_the_reference(run: Run, setup: Setup, steps: int) -> Reference:
    told = chapters(run)
    reference = Reference(setup, told[0].seats)
    for chapter, following in zip(told, [*told[1:], None], strict=True):
        cut = following is not None and not following.planned
        merged = merged_by_anybody(run, chapter) if cut else [math.inf] * setup.fragments
        reference.chapter(chapter, following, merged)
    assert set(told[-1].done.values()) == {steps}
    assert_same(run, reference.seats[told[-1].seats[0]])
    assert_every_sample_once_or_told_as_lost(run, steps)
    lost = {event["seat"]: (event["first_step"], event["samples"]) for event in events(run, "samples_lost")}
    assert lost == reference.lost
    return reference


def assert_same(run: Run, worker: Seat) -> None:
    trained = final_state(run)["model"]
    for key, value in worker.replica.model.state_dict().items():
        assert (trained[key] - value).norm() / value.norm() < 1e-9, key


KILLED = ('kind = "kill"\nrank = 2\nstep = 30',)
STREAMING = Setup(every=6, fragments=3, overlap=2, outer_lr=0.7, outer_momentum=0.9)
SETUPS = {
    "streaming DiLoCo": STREAMING,
    "local SGD": Setup(),
    "DiLoCo": Setup(every=5, outer_lr=0.7, outer_momentum=0.9),
    "streaming, mix": Setup(every=4, fragments=2, overlap=2, merge="mix"),
    "a fragment that is merged when it leaves again": Setup(every=3, fragments=2, overlap=3),
}


@pytest.mark.parametrize(
    "name", [name if name == "local SGD" else pytest.param(name, marks=pytest.mark.slow) for name in SETUPS]
)
def test_a_loss_in_the_middle_of_a_round_leaves_the_exact_average_of_those_who_go_on(name: str, tmp_path: Path) -> None:
    setup = SETUPS[name]
    given = [*plan(tmp_path, setup.sync, more="[validation]\nevery = 0"), *faults(tmp_path, *KILLED)]
    ended = train(TARGET, tmp_path / "run", *given, "--nodes", "4", "--steps", "90", "--set", "nap_s=0.03")
    assert ended.code == 0, ended.stderr
    run = Run(tmp_path / "run")
    assert [len(chapter.seats) for chapter in chapters(run)] == [4, 3]
    reference = hold_against_the_reference(run, setup, 90)
    assert reference.lost.keys() <= {2}


def test_a_newcomer_begins_from_the_anchor_and_what_it_learns_is_averaged_with_the_rest(tmp_path: Path) -> None:
    given = [
        *plan(tmp_path, STREAMING.sync, more="[validation]\nevery = 0"),
        *faults(tmp_path, 'kind = "kill"\nrank = 0\nstep = 30', 'kind = "join"\nstep = 40'),
    ]
    given += ["--nodes", "4", "--set", "nap_s=0.03"]
    last = train_until_joined(TARGET, tmp_path / "run", *given, seat=4, then=60)
    run = Run(tmp_path / "run")
    told = chapters(run)
    assert [len(chapter.seats) for chapter in told] == [4, 3, 4]
    assert told[2].took == [4]
    assert hold_against_the_reference(run, STREAMING, last).lost.keys() <= {0}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["streaming DiLoCo", "local SGD"])
def test_who_froze_comes_back_as_a_newcomer_and_who_is_taken_away_leaves_nothing_behind(
    name: str, tmp_path: Path
) -> None:
    setup = SETUPS[name]
    given = [
        *plan(tmp_path, setup.sync, more="[validation]\nevery = 0"),
        *faults(
            tmp_path,
            'kind = "freeze"\nrank = 0\nstep = 40\nseconds = 4.0',
            'kind = "preempt"\nrank = 2\nstep = 260',
        ),
    ]
    ended = train(TARGET, tmp_path / "run", *given, "--nodes", "4", "--steps", "400", "--set", "nap_s=0.03")
    assert ended.code == 0, ended.stderr
    run = Run(tmp_path / "run")
    told = chapters(run)
    assert [chapter.seats for chapter in told] == [[0, 1, 2, 3], [1, 2, 3], [0, 1, 2, 3], [0, 1, 3]]
    assert told[2].took == [0]
    assert hold_against_the_reference(run, setup, 400).lost.keys() <= {0}, "nothing of who left in order"


@pytest.mark.slow
def test_two_losses_within_one_round_are_both_told_to_the_sample(tmp_path: Path) -> None:
    setup = Setup(every=40, outer_lr=0.7, outer_momentum=0.9)
    given = [
        *plan(tmp_path, setup.sync, more="[validation]\nevery = 0"),
        *faults(tmp_path, 'kind = "kill"\nrank = 3\nstep = 45', 'kind = "kill"\nrank = 1\nstep = 60'),
    ]
    ended = train(TARGET, tmp_path / "run", *given, "--nodes", "4", "--steps", "100", "--set", "nap_s=0.05")
    assert ended.code == 0, ended.stderr
    run = Run(tmp_path / "run")
    assert [chapter.seats for chapter in chapters(run)] == [[0, 1, 2, 3], [0, 1, 2], [0, 2]]
    lost = hold_against_the_reference(run, setup, 100).lost
    assert {seat: first for seat, (first, _) in lost.items()} == {3: 41, 1: 41}


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 60])
def test_a_measured_rhythm_goes_over_to_later_views_and_one_that_is_not_is_measured_there(
    step: int, tmp_path: Path
) -> None:
    given = [
        *plan(tmp_path, 'kind = "local"', more="[validation]\nevery = 0"),
        *faults(tmp_path, f'kind = "kill"\nrank = 0\nstep = {step}', 'kind = "join"\nstep = 70'),
    ]
    ended = train(TARGET, tmp_path / "run", *given, "--nodes", "3", "--steps", "250", "--set", "nap_s=0.05")
    assert ended.code == 0, ended.stderr
    run = Run(tmp_path / "run")
    assert [len(chapter.seats) for chapter in chapters(run)] == [3, 2, 3]
    told = events(run, "rhythm")
    assert len(told) == (2 if step == 4 else 3), "one for each view that trained by it"
    assert len({(event["every"], event["fragments"], event["overlap"]) for event in told}) == 1
    assert_every_sample_once_or_told_as_lost(run, 250)


@pytest.mark.slow
def test_under_a_codec_error_feedback_begins_anew_and_training_goes_on(tmp_path: Path) -> None:
    told = calm_and_struck(tmp_path, STREAMING.sync, "topk")
    [reset] = events(told.run, "residuals_reset")
    assert reset["step"] == chapters(told.run)[1].start
    told.assert_learned_alike()


@pytest.mark.slow
def test_killed_all_at_once_and_resumed_all_begin_from_the_anchor_with_its_momentum(tmp_path: Path) -> None:
    setup = SETUPS["DiLoCo"]
    given = [*plan(tmp_path, setup.sync, more="[validation]\nevery = 0\n[checkpoint]\nevery = 7"), "--nodes", "2"]
    with training(TARGET, tmp_path / "run", *given, "--steps", "40", "--set", "nap_s=0.03") as handle:
        handle.wait_for_step(18)
        handle.kill_everything()
    ended = train(TARGET, tmp_path / "run", *given, "--steps", "40", "--set", "nap_s=0.03", "--resume")
    assert ended.code == 0, ended.stderr
    run = Run(tmp_path / "run")
    [resumed] = events(run, "resumed")
    step = resumed["step"]
    assert step % 5, "a rank has learned something since the last round"
    reference, never = Reference(setup, [0, 1]), [math.inf]
    reference.steps(Chapter(1, [0, 1], False, 0, {0: step, 1: step}), [0, 1], never, step)
    again = Chapter(1, [0, 1], False, step, {0: 40, 1: 40}, took=[0, 1])
    reference.enter(again, 0)
    reference.chapter(again, None, never)
    assert_same(run, reference.seats[0])
    missing = sum(sum(map(len, samples_of(s, (1.0, 1.0)))) for s in range(step // 5 * 5, step))
    assert any(f"learned from {missing} samples" in event["message"] for event in events(run, "warning"))
