"""Stories that families share, told of a job that writes down which samples each of its processes computed on."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from elastic_runs import chapters, events, faults, plan

from command_line import train
from shoal.run import Run
from training_runs import final_state

SEEN = f"{Path(__file__).parents[1] / 'jobs' / 'seen.py'}:job"


def seen_by(folder: Path) -> dict[int, list[int]]:
    """Seat -> the samples that it computed on, in order."""
    return {
        int(path.name.removeprefix("seat-")): [int(i) for line in path.read_text().split() for i in line.split(",")]
        for path in folder.iterdir()
    }


def twice_after_a_loss(folder: Path, sync: str, victim: int) -> int:
    """At their own pace, one of four ranks is killed and another joins: ten epochs of 480 samples, none missing.

    Returns how often a sample was used once more, each time one that the victim had taken with it.
    """
    (folder / "seen").mkdir()
    given = [
        *plan(folder, sync),
        *faults(folder, f'kind = "kill"\nrank = {victim}\nstep = 100', 'kind = "join"\nstep = 5'),
        *("--set", f"seen={folder / 'seen'}", "--set", "num_samples=480", "--set", "nap_s=0.03"),
    ]
    ended = train(SEEN, folder / "run", *given, "--nodes", "4", "--steps", "400")
    assert ended.code == 0, ended.stderr
    run, seen = Run(folder / "run"), seen_by(folder / "seen")
    told = chapters(run)
    assert any(victim not in chapter.seats for chapter in told)
    assert len(told[-1].seats) == 4, "one came, one went"
    assert seen[4], "the newcomer took part"
    counts = Counter(index for indices in seen.values() for index in indices)
    assert min(counts.values()) >= 10, "a sample of some epoch is missing"
    excess = Counter({index: count - 10 for index, count in counts.items() if count > 10})
    assert excess <= Counter(seen[victim]), "twice is only what the lost one had in hand"
    assert final_state(run)["progress"]["samples"] == 4800
    return excess.total()


@dataclass(frozen=True)
class Comparison:
    """One plan without a fault, and with one of four ranks killed in the middle. Losses: of each validation."""

    calm: list[float]
    struck: list[float]
    run: Run
    """The one with a fault."""

    def assert_learned_alike(self) -> None:
        """What is lost by a loss is small beside what was learned."""
        first, last = self.struck[0], self.calm[-1]
        assert self.struck[-1] < last + 0.1 * (first - last)


def calm_and_struck(folder: Path, sync: str, codec: str) -> Comparison:
    """Train both, under a codec."""
    (folder / "seen").mkdir()
    given = [
        *plan(folder, sync, more=f'[codec]\nkind = "{codec}"\n[validation]\nevery = 20'),
        *("--set", f"seen={folder / 'seen'}", "--set", "nap_s=0.01", "--nodes", "4", "--steps", "200"),
    ]
    losses = {}
    for name, more in {"calm": [], "struck": faults(folder, 'kind = "kill"\nrank = 1\nstep = 70')}.items():
        ended = train(SEEN, folder / name, *given, *more)
        assert ended.code == 0, ended.stderr
        losses[name] = [event["loss"] for event in events(Run(folder / name), "validation")]
    return Comparison(losses["calm"], losses["struck"], Run(folder / "struck"))
