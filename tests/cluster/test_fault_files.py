"""A list of faults means what it says, every mistake in it is one sentence, and drawn ones keep their promises."""

from __future__ import annotations

import itertools
import typing
from pathlib import Path

import pytest

from shoal.cluster.faults import RULES, Fault, Faults, Kind, RandomFaults, load_faults, schedule
from shoal.errors import FaultsError


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "faults.toml"
    path.write_text(text)
    return path


def test_every_kind_has_its_rule() -> None:
    assert typing.get_args(Kind) == tuple(RULES)


def test_a_file_names_faults_and_they_come_in_order_of_step(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "seed = 3\n"
        '[[fault]]\nkind = "slow"\nnode = "node1"\nstep = 50\nseconds = 3\nfactor = 4\n'
        '[[fault]]\nkind = "kill"\nrank = 2\nstep = 40\n'
        '[[fault]]\nkind = "kill_coordinator"\nstep = 40\n',
    )
    kill, coordinator, slow = schedule(load_faults(path), 3)
    assert (kill.kind, kill.rank, kill.node, kill.step, kill.seconds) == ("kill", 2, None, 40, None)
    assert (coordinator.kind, coordinator.rank) == ("kill_coordinator", None)
    assert (slow.kind, slow.node, slow.seconds, slow.factor) == ("slow", "node1", 3.0, 4.0)
    assert str(kill) == "kill of rank 2 at step 40"
    assert kill.where == f"{path}:10"
    assert len({fault.seed for fault in (kill, coordinator, slow)}) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"faults.toml: it has no \[\[fault\]\] and no \[random\] table"),
        ("[[fault", "not valid TOML"),
        ('[[fault]]\nkind = "kil"', r":2: fault.0.kind: got 'kil', expected .* \(did you mean 'kill'\?\)"),
        ('[[fault]]\nkind = "kill"\nrank = 1\nsteps = 2', r":4: unknown key 'steps' \(did you mean 'step'\?\)"),
        ('[[fault]]\nkind = "kill"\nrank = 1', ":1: fault.0.step is missing"),
        ('[[fault]]\nkind = "kill"\nrank = 1\nstep = 0', ":4: fault.0.step: got the integer 0, expected greater than"),
        ('[[fault]]\nkind = "kill"\nrank = -1\nstep = 1', ":3: fault.0.rank: got the integer -1"),
        ('[[fault]]\nkind = "kill"\nstep = 1', r":2: fault.0.kind: kill strikes somebody; name a rank .* or a node"),
        ('[[fault]]\nkind = "kill"\nrank = 1\nnode = "a"\nstep = 1', ":4: fault.0.node: rank and node are both given"),
        ('[[fault]]\nkind = "join"\nrank = 1\nstep = 1', ":3: fault.0.rank: join strikes the run as a whole"),
        (
            '[[fault]]\nkind = "join"\nstep = 9\n[[fault]]\nkind = "kill"\nrank = 1\nstep = 1\nfactor = 2.0',
            ":8: fault.1.factor: kill has no degree; only slow and slow_link take a factor",
        ),
        (
            '[[fault]]\nkind = "kill"\nrank = 1\nstep = 1\nseconds = 2.0',
            ":5: fault.0.seconds: kill does not last; only freeze, slow, cut, slow_link and fill_disk take seconds",
        ),
        ('[[fault]]\nkind = "slow"\nrank = 1\nstep = 1', ":2: fault.0.kind: slow needs a factor"),
        ('[[fault]]\nkind = "slow"\nrank = 1\nstep = 1\nfactor = 0.5', ":5: fault.0.factor: .* greater than 1"),
        ('[[fault]]\nkind = "freeze"\nrank = 1\nstep = 1\nseconds = 0', ":5: fault.0.seconds: .* greater than 0"),
        ('[random]\nkinds = ["kill"]', ":1: random.count is missing"),
        ('[random]\ncount = 1\nkinds = ["kil"]', r":3: random.kinds.0: got 'kil', .* \(did you mean 'kill'\?\)"),
        ("[random]\ncount = 1\nkinds = []", ":3: random.kinds: got the array"),
        ('[random]\ncount = 1\nkinds = ["kill"]\nspare = 0', ":4: random.spare: got the integer 0"),
        (
            '[random]\ncount = 1\nkinds = ["kill"]\nevery_steps = [9, 3]',
            r":4: random.every_steps: got \[9, 3\], expected the least first",
        ),
        (
            '[random]\ncount = 1\nkinds = ["kill"]\nfactor = [2.0, 3.0]',
            ":4: random.factor: none of the kinds takes factor",
        ),
    ],
)
def test_a_wrong_file_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(FaultsError, match=message) as caught:
        load_faults(written(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FaultsError, match=r"cannot read .*none\.toml: No such file"):
        load_faults(tmp_path / "none.toml")


def test_a_fault_made_in_python_is_checked_too() -> None:
    with pytest.raises(FaultsError, match="fault: factor: kill has no degree"):
        Fault(kind="kill", rank=0, step=1, factor=2.0)
    with pytest.raises(FaultsError, match="fault: step: got the integer 0"):
        Fault(kind="kill", rank=0, step=0)


def test_a_rank_that_the_run_does_not_have_is_refused_with_its_line(tmp_path: Path) -> None:
    faults = load_faults(written(tmp_path, '[[fault]]\nkind = "kill"\nrank = 4\nstep = 9\n'))
    with pytest.raises(FaultsError, match=r"faults.toml:3: rank: got 4, expected 0 to 3: the run has 4 ranks$"):
        schedule(faults, 4)
    assert len(schedule(faults, 5)) == 1


def test_a_rank_that_joined_before_can_be_named() -> None:
    kill = Fault(kind="kill", rank=4, step=9)
    assert len(schedule(Faults(named=(kill, Fault(kind="join", step=8))), 4)) == 2
    with pytest.raises(FaultsError, match="rank: got 4, expected 0 to 3"):
        schedule(Faults(named=(kill, Fault(kind="join", step=9))), 4)


SOAK = RandomFaults(count=200, kinds=tuple(kind for kind in RULES if kind != "fill_disk"), every_steps=(3, 20), spare=2)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_ranks", [3, 4, 8])
def test_drawn_faults_keep_their_distance_and_leave_the_spare_ranks(seed: int, num_ranks: int) -> None:
    faults = schedule(Faults(seed=seed, random=SOAK), num_ranks)
    assert len(faults) == 200
    steps = [0, *(fault.step for fault in faults)]
    assert all(3 <= later - earlier <= 20 for earlier, later in itertools.pairwise(steps))
    alive, joined = set(range(num_ranks)), 0
    for fault in faults:
        assert fault.rank is None or fault.rank in alive
        if fault.kind in ("kill", "preempt"):
            alive -= {fault.rank}
        elif fault.kind == "join":
            alive.add(num_ranks + joined)
            joined += 1
        assert 2 <= len(alive) <= num_ranks
        assert (fault.seconds is None) == (not fault.rule.lasting)
        assert (fault.factor is None) == (not fault.rule.scaled)
    assert {fault.kind for fault in faults} == set(SOAK.kinds)


def test_the_same_seed_draws_the_same_faults() -> None:
    one, same, other = (schedule(Faults(seed=seed, random=SOAK), 4) for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_a_named_fault_changes_none_that_is_drawn() -> None:
    drawn = schedule(Faults(seed=1, random=SOAK), 4)
    named = Fault(kind="kill", rank=0, step=1)
    assert schedule(Faults(seed=1, named=(named,), random=SOAK), 4) == [named, *drawn]


def test_a_soak_that_would_run_out_of_ranks_is_refused() -> None:
    soak = RandomFaults(count=3, kinds=("kill",), spare=2)
    assert len(schedule(Faults(random=soak), 5)) == 3
    with pytest.raises(FaultsError, match=r"only 2 of 3 faults: then 2 ranks are left, .* add 'join' to the kinds"):
        schedule(Faults(random=soak), 4)
