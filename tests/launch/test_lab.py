"""The lab gives what was asked, on real namespaces, and leaves nothing behind however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.cluster.description import Cluster, Node, parse_lab
from shoal.errors import LabError
from shoal.launch.lab import check, claim, lab, namespace, quota, rights, sweep
from shoal.launch.lab.lab import Lab
from shoal.launch.placement import Placement, Seating

_MISSING = [needed.what for needed in rights.availability() if not needed.ok]
on_a_machine_with_rights = pytest.mark.skipif(bool(_MISSING), reason=f"the lab needs {', '.join(_MISSING)}")


def all_traces() -> set[str]:
    """Everything on the machine that bears a lab's name."""
    controller = quota.find_controller()
    groups = [group.name for group in controller.groups()] if controller else []
    places = (namespace.NAMESPACES, namespace.HOSTS)
    names = groups + [name for place in places if place.exists() for name in os.listdir(place)]
    return {name for name in names if claim.lab_id_in(name)} | {f"lock {i}" for i in claim.claimed_ids()}


def traces_of(*lab_ids: str) -> set[str]:
    """What is left of these labs; others may run on the machine at the same time."""
    return {trace for trace in all_traces() if any(lab_id in trace for lab_id in lab_ids)}


@pytest.fixture(autouse=True)
def own_ids(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The ids of the labs that the test makes in this process; nothing of them may be left at its end."""
    ids: list[str] = []

    def token(size_bytes: int) -> str:
        ids.append(secrets.token_bytes(size_bytes).hex())
        return ids[-1]

    monkeypatch.setattr("shoal.launch.lab.claim.secrets.token_hex", token)
    yield ids
    assert traces_of(*ids) == set()


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labs of this test are not measured: it is about something else, and a busy machine must not fail it."""
    monkeypatch.setattr(lab, "check", lambda network, nodes, groups: {})


def run_in(seat: Placement, *command: str) -> subprocess.Popen[str]:
    return subprocess.Popen([*seat.prefix, *command], stdout=subprocess.PIPE, text=True, env=environment(seat))


def environment(seat: Placement) -> dict[str, str]:
    return {**os.environ, **seat.env}


def python_that_holds_a_lab(then: str) -> str:
    """A program that makes an unmeasured lab with a sleeping worker, prints its id and the worker's pid, goes on."""
    return f"""
import signal, subprocess, sys, time
from shoal.cluster.description import parse_lab
from shoal.launch.lab import lab
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is born with it ignored
lab.check = lambda *a: {{}}
with lab.Lab(parse_lab("nodes=2,link=100mbit,cpu=0.2")) as it:
    command = [*it.seating().placements[1].prefix, "sh", "-c", "echo in; exec sleep 1000"]
    worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    worker.stdout.readline()
    print(it._claim.lab_id, worker.pid, flush=True)
    {then}
"""


_parents: list[subprocess.Popen[str]] = []


def in_python(program: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program]
    _parents.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True))
    return _parents[-1]


@pytest.fixture(autouse=True)
def nothing_outlives_a_test_that_failed() -> Iterator[None]:
    """Also one that ran out of time while its parent process held a lab."""
    yield
    parents = [parent for parent in _parents if parent.poll() is None]
    _parents.clear()
    for parent in parents:
        parent.kill()
        parent.wait()
    if parents:
        sweep.sweep()


def started(then: str) -> tuple[subprocess.Popen[str], str, int]:
    parent = in_python(python_that_holds_a_lab(then))
    assert parent.stdout is not None
    lab_id, pid = parent.stdout.readline().split()
    return parent, lab_id, int(pid)


def wait_until_gone(pid: int, timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while _runs(pid):
        assert time.monotonic() < deadline, f"process {pid} still runs"
        time.sleep(0.01)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


# What it gives


@on_a_machine_with_rights
def test_each_link_gives_its_rate_both_ways_and_the_slow_node_is_slow() -> None:
    nodes = (Node(name="a", link="50mbit"), Node(name="slow", link="5mbit"), Node(name="free"))
    with Lab(Cluster(nodes=nodes)) as it:
        for name, rate in (("a", 50e6), ("slow", 5e6)):
            measured = it.measured[name]
            assert measured.up_bits_per_s == pytest.approx(rate, rel=0.15)
            assert measured.down_bits_per_s == pytest.approx(rate, rel=0.15)
        assert it.measured["free"] == check.Measured()


@on_a_machine_with_rights
def test_a_cpu_quota_holds() -> None:
    nodes = (Node(name="a", cpu=0.3), Node(name="slow", cpu=0.1), Node(name="free"))
    with Lab(Cluster(nodes=nodes)) as it:
        assert it.measured["a"].cpu == pytest.approx(0.3, rel=0.15)
        assert it.measured["slow"].cpu == pytest.approx(0.1, rel=0.15)
        assert it.measured["free"].cpu is None


@on_a_machine_with_rights
def test_a_link_that_is_not_what_was_asked_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "shape", lambda network, nodes: None)
    with pytest.raises(LabError, match=r"node0, up: got .*, expected 10 Mbit/s .* limit does not hold"):
        Lab(parse_lab("nodes=2,link=10mbit")).__enter__()


@on_a_machine_with_rights
@pytest.mark.usefixtures("unchecked")
def test_ranks_are_seated_node_by_node_and_nodes_know_each_other_by_name() -> None:
    with Lab(parse_lab("nodes=2,ranks=2,cpu=0.3")) as it:
        seating = it.seating()
        assert [(p.rank, p.node, p.local_rank) for p in seating.placements] == [
            (0, "node0", 0),
            (1, "node0", 1),
            (2, "node1", 0),
            (3, "node1", 1),
        ]
        worker = run_in(seating.placements[2], sys.executable, "-c", WHO)
        out, _ = worker.communicate(timeout=30)
        assert out.split() == [str(worker.pid), "10.77.0.1", "10.77.0.2", "10.77.0.2"]
        assert seating.address == "10.77.0.1"


WHO = """
import os, socket
print(os.getpid(), *map(socket.gethostbyname, ["node0", "node1", socket.gethostname()]))
"""

ALL_REDUCE = """
import sys, torch, torch.distributed as dist
rank, world, address, port = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
store = dist.TCPStore(address, port, world, rank == 0)
dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
numbers = torch.full((250_000,), float(rank + 1))
dist.all_reduce(numbers)
print(numbers.min().item(), numbers.max().item())
dist.barrier()
dist.destroy_process_group()
"""


@on_a_machine_with_rights
@pytest.mark.usefixtures("unchecked")
def test_a_gloo_all_reduce_goes_over_the_links() -> None:
    with Lab(parse_lab("nodes=4,link=100mbit")) as it:
        before = it.counters()
        assert all_reduced(it.seating()) == ["10.0 10.0"] * 4
        for name, (sent, received) in it.counters().items():
            # A ring of 4 sends 2 * 3/4 of the 1 MB from each node; the rest is headers and acknowledgements.
            assert 1.4e6 < sent - before[name][0] < 2.5e6
            assert 1.4e6 < received - before[name][1] < 2.5e6


def all_reduced(seating: Seating) -> list[str]:
    world = len(seating.placements)
    arguments = [str(world), seating.address, str(seating.port)]
    workers = [run_in(s, sys.executable, "-c", ALL_REDUCE, str(s.rank), *arguments) for s in seating.placements]
    return [worker.communicate(timeout=120)[0].strip() for worker in workers]


@on_a_machine_with_rights
@pytest.mark.usefixtures("unchecked")
def test_two_labs_at_once_do_not_clash() -> None:
    with Lab(parse_lab("nodes=2,cpu=0.2")) as one:
        with Lab(parse_lab("nodes=2,cpu=0.2")) as other:
            sweep.sweep()
            assert set(one.counters()) == set(other.counters()) == {"node0", "node1"}
            assert one.seating().placements[0].prefix != other.seating().placements[0].prefix
        sweep.sweep()
        assert set(one.counters()) == {"node0", "node1"}


# How it ends


@on_a_machine_with_rights
@pytest.mark.usefixtures("unchecked")
def test_everything_is_gone_after_exit_and_after_an_exception(own_ids: list[str]) -> None:
    with Lab(parse_lab("nodes=2,link=10mbit,cpu=0.2")) as it:
        worker = run_in(it.seating().placements[0], "sh", "-c", "echo in; exec sleep 1000")
        assert worker.stdout is not None
        assert worker.stdout.readline() == "in\n"
        assert len(traces_of(*own_ids)) == 4  # the switch, two nodes, the lock
    assert traces_of(*own_ids) == set()
    worker.communicate(timeout=10)
    assert worker.returncode == -signal.SIGKILL
    with pytest.raises(ZeroDivisionError), Lab(parse_lab("nodes=2")):
        _ = 1 / 0
    assert traces_of(*own_ids) == set()


@on_a_machine_with_rights
@pytest.mark.parametrize("step", ["shape", "check"])
@pytest.mark.parametrize("mistake", [KeyboardInterrupt, LabError("no")])
def test_everything_is_gone_after_a_step_of_the_building_fails(
    monkeypatch: pytest.MonkeyPatch, own_ids: list[str], step: str, mistake: BaseException
) -> None:
    def fail(*arguments: object) -> None:
        raise mistake

    monkeypatch.setattr(lab, step, fail)
    with pytest.raises((KeyboardInterrupt, LabError)):
        Lab(parse_lab("nodes=2,cpu=0.2")).__enter__()
    assert len(own_ids) == 1
    assert traces_of(*own_ids) == set()


@on_a_machine_with_rights
def test_everything_is_gone_after_an_interrupt() -> None:
    parent, lab_id, worker = started("time.sleep(1000)")
    assert len(traces_of(lab_id)) == 4
    parent.send_signal(signal.SIGINT)
    parent.communicate(timeout=30)
    assert traces_of(lab_id) == set()
    wait_until_gone(worker)


@on_a_machine_with_rights
def test_what_a_killed_parent_leaves_is_swept_by_the_next_lab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "check", lambda *arguments: {})
    parent, lab_id, worker = started("time.sleep(1000)")
    parent.kill()
    parent.communicate(timeout=30)
    assert len(traces_of(lab_id)) == 4
    assert _runs(worker)
    assert sweep.leftovers() >= 1
    with Lab(parse_lab("nodes=1")):
        assert traces_of(lab_id) == set()
        wait_until_gone(worker)


@on_a_machine_with_rights
@pytest.mark.parametrize("delay_s", [0.0, 0.02, 0.05, 0.1])
def test_a_parent_killed_while_building_is_swept_too(delay_s: float) -> None:
    program = python_that_holds_a_lab("pass").replace("lab.check =", "print('go', flush=True); lab.check =")
    parent = in_python(program)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "go\n"
    time.sleep(delay_s)
    parent.kill()
    parent.communicate(timeout=30)
    time.sleep(0.2)  # a batch of `ip` that outlives its parent ends by itself
    sweep.sweep()
    assert sweep.leftovers() == 0


# What it says


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("os.geteuid", lambda: 1000, r"needs: root .*\(run the same command with sudo"),
        ("_missing_capabilities", lambda: ["CAP_NET_ADMIN"], "needs: root with CAP_NET_ADMIN"),
        ("shutil.which", lambda tool: None, r"'ip' \(apt-get install iproute2\); .*'tc'"),
    ],
)
def test_without_rights_or_tools_it_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, attribute: str, value: object, message: str
) -> None:
    monkeypatch.setattr(f"shoal.launch.lab.rights.{attribute}", value)
    with pytest.raises(LabError, match=message):
        Lab(parse_lab("nodes=1")).__enter__()
    bad = [needed for needed in rights.availability() if not needed.ok]
    assert bad
    assert all(needed.remedy for needed in bad)


@on_a_machine_with_rights
def test_more_quota_than_the_machine_has_cores_is_refused() -> None:
    with pytest.raises(LabError, match=r"ask for 4000 CPU together .* can have cpu="):
        Lab(parse_lab("nodes=4,cpu=1000")).__enter__()


def test_a_lab_that_is_not_up_has_no_seats() -> None:
    with pytest.raises(RuntimeError, match="not up"):
        Lab(parse_lab("nodes=1")).seating()


# Its parts


def test_version_2_of_control_groups_gets_one_line(tmp_path: Path) -> None:
    (tmp_path / "cgroup.subtree_control").write_text("")
    (tmp_path / "cgroup.controllers").write_text("cpu io\n")
    controller = quota.find_controller(f"cgroup2 {tmp_path} cgroup2 rw 0 0\n")
    assert controller == quota.CpuController(root=tmp_path, version=2)
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+cpu"
    group = controller.create("shoal-00000000-a", 0.5)
    assert (group / "cpu.max").read_text() == "10000 20000"
    assert controller.groups() == [group]


def test_version_1_of_control_groups_is_taken_first(tmp_path: Path) -> None:
    mounts = f"cgroup2 /unified cgroup2 rw 0 0\ncgroup {tmp_path} cgroup rw,cpu,cpuacct 0 0\n"
    controller = quota.find_controller(mounts)
    assert controller == quota.CpuController(root=tmp_path, version=1)
    group = controller.create("shoal-00000000-a", 0.01)
    assert (group / "cpu.cfs_quota_us").read_text() == "1000"
    assert (group / "cpu.cfs_period_us").read_text() == "100000"


def test_no_controller_is_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert quota.find_controller(f"cgroup2 {tmp_path} cgroup2 rw 0 0\n") is None
    monkeypatch.setattr(quota, "find_controller", lambda: None)
    with pytest.raises(LabError, match=r"none is mounted: mount one .* or leave cpu= out"):
        quota.require_controller()


def test_an_id_belongs_to_one_owner_until_it_dies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(claim, "lock_directory", lambda: tmp_path / "locks")
    mine = claim.claim_new()
    assert claim.claim_dead(mine.lab_id) is None
    assert not claim.is_dead(mine.lab_id)
    with _released(tmp_path / "locks" / f"{mine.lab_id}.lock"):
        assert claim.claimed_ids() == {mine.lab_id}
    mine.release()
    mine.release()
    assert not (tmp_path / "locks").exists()
    assert claim.is_dead(mine.lab_id)


@contextlib.contextmanager
def _released(path: Path) -> Iterator[None]:
    """The lock is held by somebody else than this descriptor."""
    with path.open("r+") as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


@pytest.mark.parametrize("name", ["shoal-12345678", "shoal-12345678-node0", "shoal-12345678-a-b"])
def test_a_labs_things_are_known_by_name(name: str) -> None:
    assert claim.lab_id_in(name) == "12345678"


@pytest.mark.parametrize("name", ["shoal", "shoal-1234567", "shoal-12345678x", "my-shoal-12345678", "shoal-user"])
def test_nobody_elses_things_are(name: str) -> None:
    assert claim.lab_id_in(name) is None
