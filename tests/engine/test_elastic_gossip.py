"""Gossip through losses and arrivals, held against D-PSGD written out with the graph of each view."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from elastic_runs import (
    Chapter,
    assert_every_sample_once_or_told_as_lost,
    chapters,
    events,
    faults,
    plan,
)
from replicas import TARGET, Replica, copied, samples_of
from seen_runs import SEEN, calm_and_struck, seen_by, twice_after_a_loss
from torch import Tensor

from command_line import train, train_until_joined
from shoal.run import Run
from shoal.strategy.sync.gossip import GossipConfig, graph_of
from training_runs import final_state


def step_alone(replica: Replica, rank: int, size: int, step: int) -> None:
    """One local step on rank `rank`'s part of a batch."""
    samples = samples_of(step, (1.0,) * size)
    replica.gradient(samples[rank], len(samples[rank]) * size / sum(map(len, samples)))
    replica.update()


def step_together(replicas: dict[int, Replica], chapter: Chapter, topology: str, step: int) -> None:
    """One step of D-PSGD, of those who have committed it."""
    size = len(chapter.seats)
    graph = graph_of(GossipConfig(topology=topology), size, step=step)
    before = {seat: [p.detach().clone() for p in replicas[seat].parameters] for seat in chapter.seats}
    for rank, seat in enumerate(chapter.seats):
        if chapter.done[seat] <= step:
            continue
        samples, replica = samples_of(step, (1.0,) * size), replicas[seat]
        replica.gradient(samples[rank], len(samples[rank]) * size / sum(map(len, samples)))
        for index, p in enumerate(replica.parameters):
            own = before[seat][index]
            others = [(graph.weight(rank, peer), before[chapter.seats[peer]][index]) for peer in graph.neighbours(rank)]
            p.data.copy_(own + sum((weight * (other - own) for weight, other in others), torch.zeros_like(own)))
        replica.update()


def mean(replicas: list[Replica]) -> list[Tensor]:
    return [torch.stack([p.detach() for p in together]).mean(dim=0) for together in _together(replicas)]


def _together(replicas: list[Replica]) -> list[tuple[Tensor, ...]]:
    return list(zip(*(replica.parameters for replica in replicas), strict=True))


def reference(run: Run, topology: str, steps: int) -> dict[str, Tensor]:
    """The mean of all replicas at the end, given the steps that each seat had done when a view ended."""
    told = chapters(run)
    replicas = {seat: Replica(seat) for seat in told[0].seats}
    for chapter, following in zip(told, [*told[1:], None], strict=True):
        for step in range(chapter.start, max(chapter.done.values())):
            step_together(replicas, chapter, topology, step)
        if following is None:
            break
        if following.planned:
            agreed = mean([replicas[seat] for seat in chapter.seats])
            for replica in replicas.values():
                for p, value in zip(replica.parameters, agreed, strict=True):
                    p.data.copy_(value)
        keeping = [seat for seat in following.seats if seat not in following.took]
        for seat in keeping:
            for step in range(chapter.done[seat], following.start):
                step_alone(replicas[seat], chapter.seats.index(seat), len(chapter.seats), step)
        teller = replicas[max(keeping, key=lambda seat: (chapter.done[seat], -seat))]
        replicas = {seat: replicas[seat] if seat in keeping else copied(teller) for seat in following.seats}
    last = list(replicas.values())
    assert set(told[-1].done.values()) == {steps}
    for p, value in zip(last[0].parameters, mean(last), strict=True):
        p.data.copy_(value)
    return last[0].model.state_dict()


@pytest.mark.parametrize("topology", ["ring", pytest.param("matching", marks=pytest.mark.slow)])
def test_a_lost_neighbour_and_a_newcomer_leave_d_psgd_of_the_graphs_of_their_views(
    topology: str, tmp_path: Path
) -> None:
    given = [
        *plan(tmp_path, f'kind = "gossip"\ntopology = "{topology}"', more="[validation]\nevery = 0"),
        *faults(tmp_path, 'kind = "kill"\nrank = 2\nstep = 30', 'kind = "join"\nstep = 40'),
    ]
    given += ["--nodes", "4", "--set", "nap_s=0.03"]
    last = train_until_joined(TARGET, tmp_path / "run", *given, seat=4, then=60)
    run = Run(tmp_path / "run")
    told = chapters(run)
    assert [len(chapter.seats) for chapter in told] == [4, 3, 4]
    trained = final_state(run)["model"]
    for key, value in reference(run, topology, last).items():
        assert (trained[key] - value).norm() / value.norm() < 1e-9, key
    assert_every_sample_once_or_told_as_lost(run, last)
    [lost] = events(run, "samples_lost")
    assert lost["seat"] == 2
    assert lost["last_step"] == told[1].start
    assert lost["last_step"] - lost["first_step"] < 20, "neighbours knew of nearly all that it did"


@pytest.mark.slow  # in CI the servers' form stands for both: the leases are the same
@pytest.mark.parametrize("victim", [0, 2])
def test_at_their_own_pace_ranks_lease_again_what_nobody_has_learned_from_the_lost_one(
    victim: int, tmp_path: Path
) -> None:
    """Rank 0 holds the counter of the leases."""
    twice = twice_after_a_loss(tmp_path, 'kind = "gossip"\nmode = "asynchronous"', victim)
    assert twice <= 12, "averages have told of nearly all that it did"


@pytest.mark.slow
def test_under_a_codec_neighbours_begin_anew_to_tell_each_other_and_stay_close(tmp_path: Path) -> None:
    told = calm_and_struck(tmp_path, 'kind = "gossip"', "int8")
    run = told.run
    [reset] = events(run, "gossip_memory_reset")
    assert reset["step"] == chapters(run)[1].start
    distances = [(event["step"], event["distance"]) for event in events(run, "consensus")]
    assert [step for step, _ in distances][:10] == list(range(20, 201, 20))
    before = max(distance for step, distance in distances if step <= reset["step"])
    assert distances[-1][1] < 2 * before, "the healed ring mixes as the old one did"
    told.assert_learned_alike()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["synchronous", "asynchronous"])
def test_who_froze_comes_back_as_a_newcomer_and_who_is_taken_away_leaves_nothing_behind(
    mode: str, tmp_path: Path
) -> None:
    (tmp_path / "seen").mkdir()
    given = [
        *plan(tmp_path, f'kind = "gossip"\nmode = "{mode}"', more="[validation]\nevery = 0"),
        *faults(
            tmp_path,
            'kind = "freeze"\nrank = 0\nstep = 40\nseconds = 4.0',
            'kind = "preempt"\nrank = 2\nstep = 260',
        ),
        *("--set", f"seen={tmp_path / 'seen'}", "--set", "nap_s=0.03", "--set", "num_samples=480"),
    ]
    ended = train(SEEN, tmp_path / "run", *given, "--nodes", "4", "--steps", "400")
    assert ended.code == 0, ended.stderr
    run = Run(tmp_path / "run")
    told = chapters(run)
    assert [chapter.seats for chapter in told] == [[0, 1, 2, 3], [1, 2, 3], [0, 1, 2, 3], [0, 1, 3]]
    assert told[2].took == [0]
    counts = Counter(index for indices in seen_by(tmp_path / "seen").values() for index in indices)
    if mode == "asynchronous":
        assert min(counts.values()) >= 10
        assert counts.total() - 4800 <= 12, "what the frozen one had not told of"
    else:
        assert {event["seat"] for event in events(run, "samples_lost")} == {0}, "not of who left in order"
