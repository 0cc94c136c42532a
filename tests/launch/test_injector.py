"""Faults come when they are due, strike whom they should, and are undone: on real processes, by a launcher's fake."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import psutil
import pytest

from shoal.cluster.description import Cluster, parse_lab
from shoal.cluster.faults import Fault
from shoal.errors import FaultsError, LabError
from shoal.events import Event, EventLog, read_events
from shoal.launch import damage
from shoal.launch.brake import Brake
from shoal.launch.injector import Injector
from shoal.launch.lab.lab import Lab
from shoal.run import Run

SLEEP = "import time; time.sleep(1000)"
SPIN = "while True: pass"


class FakeHands:
    """A launcher's stand-in: its workers only sleep or spin, and what it is asked is kept in `asked`."""

    def __init__(self, folder: Path, num_ranks: int, *, ranks_of_a_node: int = 1, lab: object = None) -> None:
        self.run = Run(folder)
        self.lab = cast(Lab | None, lab)
        self.asked: list[tuple[Any, ...]] = []
        self.workers: dict[int, subprocess.Popen[bytes]] = {}
        self._num_ranks = num_ranks
        self._ranks_of_a_node = ranks_of_a_node
        self._coordinator: int | None = None

    def start(self, seat: int, program: str = SLEEP) -> int:
        self.workers[seat] = subprocess.Popen([sys.executable, "-I", "-S", "-c", program], start_new_session=True)
        return self.workers[seat].pid

    def start_all(self) -> None:
        for seat in self.seats():
            self.start(seat)

    def coordinate(self, pid: int) -> None:
        self._coordinator = pid

    def end(self) -> None:
        for worker in self.workers.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)  # with the processes that it started
            worker.wait()

    def seats(self) -> list[int]:
        return sorted({*range(self._num_ranks), *self.workers})

    def node_of(self, seat: int) -> str:
        return f"node{seat // self._ranks_of_a_node}"

    def pid_of(self, seat: int) -> int | None:
        worker = self.workers.get(seat)
        return worker.pid if worker is not None and worker.poll() is None else None

    def coordinator_pid(self) -> int | None:
        return self._coordinator

    def kill(self, seat: int) -> None:
        self.asked.append(("kill", seat))
        os.killpg(self.workers[seat].pid, signal.SIGKILL)

    def preempt(self, seat: int) -> None:
        self.asked.append(("preempt", seat))

    def tell(self, seat: int, line: str) -> None:
        self.asked.append(("tell", seat, line))

    def start_worker(self) -> int:
        self.start(max(self.seats()) + 1)
        return max(self.seats())


class FakeLab:
    """Keeps what was asked of its links and quotas."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.asked: list[tuple[Any, ...]] = []

    def cut(self, node: str) -> None:
        self.asked.append(("cut", node))

    def restore(self, node: str) -> None:
        self.asked.append(("restore", node))

    def set_rate(self, node: str, bits_per_s: float | None) -> None:
        self.asked.append(("rate", node, bits_per_s))

    def set_cpu(self, node: str, cpu: float) -> None:
        self.asked.append(("cpu", node, cpu))


Making = Callable[..., tuple[Injector, FakeHands]]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Making]:
    """Makes an injector and its fake; both are closed at the end."""
    events = tmp_path / "events"
    events.mkdir()
    with EventLog(events / "launcher.jsonl", "launcher") as log, contextlib.ExitStack() as stack:

        def made(*faults: Fault, num_ranks: int = 4, start: bool = True, **options: Any) -> tuple[Injector, FakeHands]:
            hands = FakeHands(tmp_path, num_ranks, **options)
            stack.callback(hands.end)
            if start:
                hands.start_all()
            injector = Injector(faults, hands, log)
            stack.callback(injector.close)
            return injector, hands

        yield made


def step(seat: int, number: int) -> Event:
    return {"t": time.time(), "source": f"rank-{seat}", "kind": "step", "step": number}


def told(hands: FakeHands, kind: str) -> list[Event]:
    return [event for event in read_events(hands.run.events) if event["kind"] == kind]


def is_stopped(pid: int) -> bool:
    return psutil.Process(pid).status() == psutil.STATUS_STOPPED


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# When, and whom


def test_a_rank_is_killed_when_its_own_step_is_seen_and_not_before(make: Making) -> None:
    injector, hands = make(Fault(kind="kill", rank=2, step=40))
    injector.observe([step(2, 39), step(1, 40), {"t": 0.0, "source": "launcher", "kind": "warning", "step": 40}])
    assert hands.asked == []
    injector.observe([step(2, 40)])
    assert hands.workers[2].wait(timeout=10) == -signal.SIGKILL
    injector.observe([step(2, 41)])
    assert hands.asked == [("kill", 2)]
    (event,) = told(hands, "fault_injected")
    assert (event["fault"], event["rank"], event["node"], event["step"]) == ("kill", 2, "node2", 40)
    assert str(hands.workers[2].pid) in event["detail"]


def test_a_node_is_struck_with_all_its_ranks(make: Making) -> None:
    injector, hands = make(Fault(kind="preempt", node="node1", step=3), ranks_of_a_node=2)
    injector.observe([step(0, 3), step(1, 3)])
    assert hands.asked == []
    injector.observe([step(3, 3)])
    assert hands.asked == [("preempt", 2), ("preempt", 3)]


def test_what_concerns_the_whole_run_waits_for_any_rank(make: Making) -> None:
    injector, hands = make(Fault(kind="join", step=5), Fault(kind="flip_message", rank=4, step=6))
    injector.observe([step(3, 5)])
    assert hands.seats() == [0, 1, 2, 3, 4]
    injector.observe([step(4, 6)])
    assert hands.asked == [("tell", 4, "flip")]


def test_the_coordinator_is_killed(make: Making) -> None:
    injector, hands = make(Fault(kind="kill_coordinator", step=1), Fault(kind="kill_coordinator", step=2))
    injector.observe([step(0, 1)])
    assert told(hands, "warning")[0]["message"] == (
        "the kill_coordinator at step 1 could not be done: there is no coordinator"
    )
    hands.coordinate(hands.start(9))
    injector.observe([step(0, 2)])
    assert hands.workers[9].wait(timeout=10) == -signal.SIGKILL


def test_what_strikes_nobody_is_told(make: Making) -> None:
    injector, hands = make(Fault(kind="freeze", rank=1, step=2))
    injector.observe([step(1, 1)])
    hands.workers[1].kill()
    hands.workers[1].wait()
    injector.observe([step(1, 2)])
    assert told(hands, "warning")[0]["message"] == (
        "the freeze of rank 1 at step 2 could not be done: no process is left of rank 1"
    )
    assert told(hands, "fault_injected") == []


def test_faults_that_never_came_are_told_at_the_end(make: Making) -> None:
    injector, hands = make(Fault(kind="kill", rank=1, step=9), Fault(kind="kill", rank=2, step=10))
    injector.observe([step(1, 8)])
    injector.close()
    injector.close()
    (event,) = told(hands, "warning")
    assert event["message"].startswith("kill of rank 1 at step 9 and 1 more faults: never happened")


def test_a_resumed_run_leaves_out_what_it_has_behind_it(make: Making) -> None:
    injector, hands = make(Fault(kind="kill", rank=1, step=100), Fault(kind="kill", rank=2, step=101))
    injector.observe([step(rank, 101) for rank in range(4)])
    assert hands.asked == [("kill", 2)]
    assert told(hands, "warning")[0]["message"].startswith("kill of rank 1 at step 100: left out")


# Drawn faults


def test_a_drawn_fault_passes_to_the_next_rank_where_its_own_is_gone(make: Making) -> None:
    faults = [Fault(kind="kill", rank=3, step=number, spare=2) for number in (1, 2, 3)]
    injector, hands = make(*faults)
    injector.observe([step(seat, 1) for seat in range(4)])
    injector.observe([step(1, 3)])
    assert hands.asked == [("kill", 3), ("kill", 0)]  # and two are spared
    hands.start(4)
    injector.observe([])
    assert len(hands.asked) == 2, "it does not train yet"
    injector.observe([step(4, 3)])
    assert hands.asked == [("kill", 3), ("kill", 0), ("kill", 4)]
    assert [event["rank"] for event in told(hands, "fault_injected")] == [3, 0, 4]


def test_a_drawn_fault_strikes_those_who_train(make: Making) -> None:
    faults = [Fault(kind="kill", rank=1, step=number, spare=0) for number in (1, 2, 3)]
    injector, hands = make(*faults, num_ranks=3)
    waits = [
        {"t": time.time(), "source": f"rank-{seat}", "kind": "waiting", "message": "all places"} for seat in (1, 2)
    ]
    injector.observe([step(0, 1), step(1, 1), *waits])
    assert hands.asked == [("kill", 0)]
    wait_until(lambda: hands.pid_of(0) is None)
    injector.observe([step(2, 2)])
    assert hands.asked == [("kill", 0), ("kill", 2)], "it trains again"
    wait_until(lambda: hands.pid_of(2) is None)
    hands.start(0)
    injector.observe([step(1, 3)])
    assert hands.asked[2:] == [("kill", 1)], "the other was only started"


def test_a_drawn_freeze_waits_until_enough_are_awake(make: Making) -> None:
    faults = [Fault(kind="freeze", rank=rank, step=1, seconds=5.0, spare=2) for rank in (0, 1)]
    injector, hands = make(*faults, num_ranks=3)
    injector.observe([step(seat, 1) for seat in range(3)])
    begin = time.monotonic()
    wait_until(lambda: [is_stopped(hands.workers[seat].pid) for seat in range(3)] == [True, False, False])
    injector.tick(begin + 6)
    wait_until(lambda: not is_stopped(hands.workers[0].pid))
    wait_until(lambda: is_stopped(hands.workers[1].pid))


# Frozen and slow processes


def test_a_freeze_stops_the_whole_process_group_and_ends_in_time(make: Making) -> None:
    injector, hands = make(Fault(kind="freeze", rank=0, step=1, seconds=0.3), num_ranks=1, start=False)
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SLEEP!r}])"
    parent = psutil.Process(hands.start(0, program))
    wait_until(lambda: bool(parent.children()))
    family = [parent.pid, parent.children()[0].pid]
    injector.observe([step(0, 1)])
    wait_until(lambda: all(map(is_stopped, family)))
    injector.tick(time.monotonic() + 0.25)
    assert all(map(is_stopped, family))
    injector.tick(time.monotonic() + 0.35)
    wait_until(lambda: not any(map(is_stopped, family)))
    (event,) = told(hands, "fault_ended")
    assert (event["fault"], event["rank"], event["detail"]) == ("freeze", 0, "its time was over")
    assert event["seconds"] == pytest.approx(0.35, abs=0.05)


def test_of_two_freezes_that_overlap_the_longer_counts(make: Making) -> None:
    faults = [Fault(kind="freeze", rank=0, step=1, seconds=seconds) for seconds in (1.0, 2.0)]
    injector, hands = make(*faults, Fault(kind="slow", rank=0, step=1, seconds=1.5, factor=2.0), num_ranks=1)
    injector.observe([step(0, 1)])
    begin, pid = time.monotonic(), hands.workers[0].pid
    for later_s in (1.1, 1.6):  # neither the other freeze's end nor the slowness wakes it
        injector.tick(begin + later_s)
        time.sleep(0.05)
        assert is_stopped(pid)
    injector.tick(begin + 2.1)
    wait_until(lambda: not is_stopped(pid))


def cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


@pytest.mark.parametrize("factor", [2.0, 4.0, 20.0])
def test_a_slow_process_gets_its_part_of_the_time(make: Making, factor: float) -> None:
    injector, hands = make(Fault(kind="slow", rank=0, step=1, factor=factor), num_ranks=2, start=False)
    pids = [hands.start(seat, SPIN) for seat in range(2)]
    wait_until(lambda: all(cpu_s(pid) > 0.05 for pid in pids))
    injector.observe([step(0, 1)])
    before = [cpu_s(pid) for pid in pids]
    time.sleep(2.0)
    slow_s, other_s = (cpu_s(pid) - start for pid, start in zip(pids, before, strict=True))
    # On a busy machine a process that was stopped is let run first, so its part of what the other gets is larger.
    assert 0.6 / factor < slow_s / max(other_s, 1.0) < 1.7 / factor + 0.02
    injector.close()
    before = [cpu_s(pid) for pid in pids]
    time.sleep(1.0)
    freed_s, other_s = (cpu_s(pid) - start for pid, start in zip(pids, before, strict=True))
    assert freed_s > 0.6 * other_s


def test_two_slownesses_multiply(make: Making) -> None:
    faults = [Fault(kind="slow", rank=0, step=1, factor=factor) for factor in (2.0, 3.0)]
    lab = FakeLab(parse_lab("nodes=2,cpu=0.6"))
    injector, hands = make(*faults, Fault(kind="freeze", rank=0, step=1, seconds=1.0), num_ranks=2, lab=lab)
    injector.observe([step(0, 1)])
    assert lab.asked == [("cpu", "node0", pytest.approx(0.3)), ("cpu", "node0", pytest.approx(0.1))]
    injector.tick(time.monotonic() + 2)
    time.sleep(0.05)
    assert not is_stopped(hands.workers[0].pid)  # its quota slows it, so nothing else does
    injector.close()
    assert lab.asked[2:] == [("cpu", "node0", pytest.approx(0.2)), ("cpu", "node0", pytest.approx(0.6))]


def test_a_fault_ends_with_its_process(make: Making) -> None:
    injector, hands = make(Fault(kind="freeze", rank=0, step=1), num_ranks=1)
    injector.observe([step(0, 1)])
    hands.end()
    injector.observe([])
    assert told(hands, "fault_ended")[0]["detail"] == "its processes are gone"


def test_everything_is_undone_by_close(make: Making) -> None:
    freeze, slow = Fault(kind="freeze", rank=0, step=1), Fault(kind="slow", rank=1, step=1, factor=50.0)
    injector, hands = make(freeze, slow, num_ranks=2)
    injector.observe([step(0, 1), step(1, 1)])
    wait_until(lambda: is_stopped(hands.workers[0].pid))
    injector.close()
    time.sleep(0.05)
    assert not any(is_stopped(worker.pid) for worker in hands.workers.values())
    assert [event["detail"] for event in told(hands, "fault_ended")] == ["the run is over"] * 2


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", SLEEP], start_new_session=True) as process:
        yield process
        process.kill()


def test_a_process_held_back_is_released_when_its_holder_is_killed(sleeper: subprocess.Popen[bytes]) -> None:
    program = f"from shoal.launch.brake import Brake; it = Brake({sleeper.pid}); it.set_share(0.0); {SLEEP}"
    with subprocess.Popen([sys.executable, "-c", program]) as holder:
        try:
            wait_until(lambda: is_stopped(sleeper.pid))
        finally:
            holder.kill()
    wait_until(lambda: not is_stopped(sleeper.pid))


def test_a_process_that_is_gone_can_be_released(sleeper: subprocess.Popen[bytes]) -> None:
    brake = Brake(sleeper.pid)
    brake.set_share(0.5)
    sleeper.kill()
    sleeper.wait()
    brake.set_share(0.0)
    brake.set_share(1.0)


# Links


def test_links_are_cut_and_slowed_as_long_as_any_fault_says_so(make: Making) -> None:
    lab = FakeLab(parse_lab("nodes=2,link=100mbit,ranks=2"))
    faults = [Fault(kind="cut", rank=2, step=1, seconds=seconds) for seconds in (1.0, 2.0)]
    faults += [Fault(kind="slow_link", node="node1", step=1, factor=4.0, seconds=seconds) for seconds in (1.0, 2.0)]
    injector, _ = make(*faults, ranks_of_a_node=2, lab=lab)
    injector.observe([step(2, 1)])
    begin = time.monotonic()
    assert lab.asked == [("cut", "node1")] * 2 + [("rate", "node1", 25e6), ("rate", "node1", 6.25e6)]
    del lab.asked[:]
    injector.tick(begin + 1.1)
    assert lab.asked == [("cut", "node1"), ("rate", "node1", 25e6)]
    del lab.asked[:]
    injector.tick(begin + 2.1)
    assert lab.asked == [("restore", "node1"), ("rate", "node1", 100e6)]


def test_a_drawn_cut_counts_all_ranks_of_its_node(make: Making) -> None:
    lab = FakeLab(parse_lab("nodes=2,link=100mbit,ranks=2"))
    injector, _ = make(
        Fault(kind="cut", rank=3, step=1, seconds=1.0, spare=2),
        Fault(kind="kill", rank=3, step=1, spare=2),
        ranks_of_a_node=2,
        lab=lab,
    )
    injector.observe([step(seat, 1) for seat in range(4)])
    assert lab.asked == [("cut", "node1")]


def test_a_fault_that_the_machine_refuses_ends_at_once_and_is_told(make: Making) -> None:
    class Refusing(FakeLab):
        def cut(self, node: str) -> None:
            raise LabError("no")

    injector, hands = make(Fault(kind="cut", rank=0, step=1), lab=Refusing(parse_lab("nodes=4")))
    injector.observe([step(0, 1)])
    assert told(hands, "fault_ended")[0]["detail"] == "it could not be done: no"


@pytest.mark.parametrize(
    ("fault", "lab", "message"),
    [
        (Fault(kind="cut", rank=0, step=1), None, r"fault: cut works on a node's own link, .* add --on lab"),
        (Fault(kind="cut", rank=0, step=1, spare=1), None, r"\[random\]: cut works"),
        (Fault(kind="kill", node="node9", step=1), None, r"node: got 'node9', expected one of node0, node1, node2"),
        (Fault(kind="slow_link", rank=0, step=1, factor=2.0), "nodes=4", "the link of node0 has none"),
        (Fault(kind="slow_link", rank=0, step=1, factor=2.0, spare=1), "nodes=4", "the link of node0 has none"),
    ],
)
def test_what_cannot_be_rehearsed_here_is_refused_before_the_start(
    make: Making, fault: Fault, lab: str | None, message: str
) -> None:
    with pytest.raises(FaultsError, match=message):
        make(fault, start=False, lab=FakeLab(parse_lab(lab)) if lab else None)


# Disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB; skips where none can be mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_small_disk_is_full_for_its_time_and_then_as_before(small_disk: Path) -> None:
    hands = FakeHands(small_disk, 1)
    hands.run.events.mkdir()
    free_bytes = psutil.disk_usage(str(small_disk)).free
    with EventLog(hands.run.events / "launcher.jsonl", "launcher") as log:
        injector = Injector([Fault(kind="fill_disk", step=1, seconds=1.0)], hands, log)
        injector.observe([step(0, 1)])
        assert psutil.disk_usage(str(small_disk)).free == 0
        with pytest.raises(OSError, match="No space"):
            (small_disk / "new").write_bytes(bytes(100_000))
        injector.tick(time.monotonic() + 2)
        injector.close()
    assert psutil.disk_usage(str(small_disk)).free > free_bytes - 100_000
    assert [event["kind"] for event in read_events(hands.run.events)] == ["fault_injected", "fault_ended"]


def test_a_large_disk_is_not_filled(make: Making, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(damage, "MOST_FREE_BYTES", 1000)
    with pytest.raises(FaultsError, match=r"fault: fill_disk: .* are free .* no more than 1000 B are filled"):
        make(Fault(kind="fill_disk", step=1), start=False)


def differing_bits(one: bytes, other: bytes) -> int:
    return sum((a ^ b).bit_count() for a, b in zip(one, other, strict=True))


def test_one_bit_of_the_newest_checkpoint_is_flipped_as_soon_as_there_is_one(make: Making, tmp_path: Path) -> None:
    injector, hands = make(Fault(kind="flip_checkpoint", step=1, seed=5), num_ranks=1)
    (hands.run.checkpoints / ".step-00000030.tmp").mkdir(parents=True)
    injector.observe([step(0, 1)])
    assert told(hands, "fault_injected") == []
    content = bytes(range(256))
    for name in ("step-00000010", "step-00000020"):
        (hands.run.checkpoints / name).mkdir()
        for file in ("manifest.json", "tensors.safetensors"):
            (hands.run.checkpoints / name / file).write_bytes(content)
    injector.observe([])
    changed = {
        str(path.relative_to(hands.run.checkpoints)): bits
        for path in sorted(hands.run.checkpoints.glob("*/*"))
        if (bits := differing_bits(path.read_bytes(), content))
    }
    assert list(changed.values()) == [1]
    (event,) = told(hands, "fault_injected")
    assert next(iter(changed)) in event["detail"]
    assert next(iter(changed)).startswith("step-00000020/")


def test_the_seed_decides_which_bit(tmp_path: Path) -> None:
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "step-00000001" / "a").write_bytes(bytes(1000))
    (tmp_path / "step-00000001" / "b").write_bytes(bytes(1000))
    first = damage.flip_byte(tmp_path, 1)
    assert damage.flip_byte(tmp_path, 2) != first
    damage.flip_byte(tmp_path, 2)
    damage.flip_byte(tmp_path, 1)
    assert {(tmp_path / "step-00000001" / name).read_bytes() for name in "ab"} == {bytes(1000)}
