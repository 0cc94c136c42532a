"""A view's groups: who waits in one is freed when it is cut, and the next one is made while this one works."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from typing import Any

import pytest

from rank_pairs import run_pair

WORLD_SIZE = 3
WORKER = """
import json, os, signal, sys, threading, time
from datetime import timedelta
import torch
import torch.distributed as dist
from shoal.errors import PeerLostError
from shoal.wire.groups import World, lost_peers_named

rank, port = int(sys.argv[1]), int(sys.argv[2])
base = dist.TCPStore("127.0.0.1", port, None, rank == 0, wait_for_workers=False, timeout=timedelta(seconds=60))
cpu = torch.device("cpu")

def view(epoch, members):
    world = World(dist.PrefixStore(f"view/{epoch}", base), members.index(rank), len(members), cpu, exempt_ports=[port])
    world.connect()
    return world

def sum_in_layout():
    with lost_peers_named():
        dist.all_reduce(torch.ones(2), group=layout)

def waited(action):
    started = time.perf_counter()
    try:
        action()
    except PeerLostError as error:
        return [time.perf_counter() - started, str(error)]
    return None

first = view(1, [0, 1, 2])
extra = first.group("extra", [0, 1, 2])
layout = first.process_group(first.group("layout", [0, 1, 2]))
sum_in_layout()
told = {"sum": first.sum([rank + 1.0])}
made = []
beside = threading.Thread(target=lambda: made.append(view(2, [0, 1, 2])))
beside.start()
for _ in range(50):
    first.sum([1.0])
beside.join()
told["next view, made beside"] = made[0].sum([2.0])
base.set(f"ready/{rank}", "")
base.wait([f"ready/{other}" for other in range(3)], timedelta(seconds=60))
if rank == 2:
    print(json.dumps(told), flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)  # silent, its sockets open: nothing would ever end what waits for it
    os._exit(0)
threading.Timer(0.5, first.cut).start()
in_layout = []
inside = threading.Thread(target=lambda: in_layout.append(waited(sum_in_layout)))
inside.start()
told["cut"] = waited(lambda: first.sum([1.0]))
told["after the cut"] = waited(lambda: first.sum([1.0]))
inside.join()
told["a layout"] = in_layout[0]
told["another group"] = waited(lambda: first.group("late", [0, 1]).barrier())
base.set(f"cut/{rank}", "")  # the store's connection is nobody's of this view
base.wait([f"cut/{other}" for other in range(2)], timedelta(seconds=60))
before = len(os.listdir("/proc/self/fd"))
first.close()
told["descriptors"] = [before, len(os.listdir("/proc/self/fd"))]
third = view(3, [0, 1])
told["survivors"] = third.sum([5.0])
print(json.dumps(told), flush=True)
third.sum([0.0])
os._exit(0)
"""


@pytest.fixture(scope="module")
def told() -> list[dict[str, Any]]:
    """What each rank saw."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(port)], env=env, stdout=subprocess.PIPE, text=True
        )
        for rank in range(WORLD_SIZE)
    ]
    try:
        lines = []
        for process in processes:
            assert process.stdout is not None
            lines.append(process.stdout.readline())
        return [json.loads(line) for line in lines]
    finally:
        for process in processes:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def test_all_ranks_sum_exactly(told: list[dict[str, Any]]) -> None:
    assert [rank["sum"] for rank in told] == [[6.0]] * 3


def test_the_next_view_is_connected_while_this_one_works(told: list[dict[str, Any]]) -> None:
    assert [rank["next view, made beside"] for rank in told] == [[6.0]] * 3


def test_a_cut_frees_who_waits_for_a_peer_that_is_silent(told: list[dict[str, Any]]) -> None:
    for rank in told[:2]:
        seconds, message = rank["cut"]
        assert 0.3 < seconds < 3.0
        assert "most likely because another rank ended" in message


def test_a_cut_frees_who_waits_inside_a_layouts_collective(told: list[dict[str, Any]]) -> None:
    """As a sharded model does in forward: torch.distributed's own functions, and no group of them all."""
    for rank in told[:2]:
        seconds, message = rank["a layout"]
        assert 0.3 < seconds < 3.0
        assert "an operation between ranks failed" in message


def test_after_a_cut_nothing_of_the_view_works_any_more(told: list[dict[str, Any]]) -> None:
    for rank in told[:2]:
        assert rank["after the cut"][0] < 1.0
        assert "cut" in rank["another group"][1] or "ended" in rank["another group"][1]


def test_a_closed_view_gives_its_sockets_back(told: list[dict[str, Any]]) -> None:
    for rank in told[:2]:
        before, after = rank["descriptors"]
        assert after <= before - 6, "three groups, each with two peers"


def test_survivors_form_another_view(told: list[dict[str, Any]]) -> None:
    assert [rank["survivors"] for rank in told[:2]] == [[10.0]] * 2


MIDWAY = """
import json, os, signal, sys, threading, time
from datetime import timedelta
import torch
import torch.distributed as dist
from shoal.errors import PeerLostError
from shoal.wire.groups import World, failures_as_lost_peers

rank, port, kind = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
base = dist.TCPStore("127.0.0.1", port, None, rank == 0, wait_for_workers=False, timeout=timedelta(seconds=60))
world = World(dist.PrefixStore("view", base), rank, 2, torch.device("cpu"), exempt_ports=[port])
world.connect()
beside = world.group("beside", [0, 1])
large = torch.ones(100_000_000)

def exchange():
    if kind == "leaving":
        (beside.send(large, 1) if rank == 0 else beside.receive(large, 0)).wait()
    elif kind == "arriving":
        (beside.send(large, 0) if rank == 1 else beside.receive(large, 1)).wait()
    else:
        beside.broadcast(large, 1)

world.everybody.barrier()
if rank == 1:
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGSTOP)).start()  # in the middle of it
    exchange()
    raise SystemExit("it came to its end before it could freeze")
threading.Timer(1.0, world.cut).start()
started = time.perf_counter()
try:
    with failures_as_lost_peers("the exchange"):
        exchange()
except PeerLostError as error:
    told = str(error)
freed_s = time.perf_counter() - started
world.close()
print(json.dumps([freed_s, time.perf_counter() - started, told]), flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("kind", ["collective", "arriving", "leaving"])
def test_a_cut_frees_who_has_got_a_part_of_a_message(kind: str) -> None:
    """Gloo alone would wait for the rest of it for half an hour, and so would whoever closes the group."""
    freed_s, closed_s, told = run_pair(MIDWAY, kind)
    assert 1.0 <= freed_s < 8.0, told
    assert closed_s < 8.0


ENDING = """
import json, os, signal, sys, threading, time
from datetime import timedelta
import torch
import torch.distributed as dist
from shoal.errors import PeerLostError
from shoal.wire.groups import World, failures_as_lost_peers

rank, port, end = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
base = dist.TCPStore("127.0.0.1", port, None, rank == 0, wait_for_workers=False, timeout=timedelta(seconds=60))
world = World(dist.PrefixStore("view", base), rank, 2, torch.device("cpu"), exempt_ports=[port])
world.connect()
one = torch.ones(4)
operations = {
    "all_reduce": lambda group: group.all_reduce(torch.ones(4)),
    "broadcast": lambda group: group.broadcast(torch.ones(4), 1),
    "all_gather": lambda group: group.all_gather([torch.ones(4), torch.ones(4)], one),
    "gather_into": lambda group: group.gather_into(torch.ones(8), one),
    "reduce_scatter": lambda group: group.reduce_scatter(torch.ones(2), torch.ones(4)),
    "barrier": lambda group: group.barrier(),
}
groups = {name: world.group(name, [0, 1]) for name in operations}
whole, own = torch.arange(4.0) + rank, torch.zeros(2)
groups["reduce_scatter"].reduce_scatter(own, whole)
assert own.tolist() == [[1.0, 3.0], [5.0, 7.0]][rank]
whole = torch.zeros(4)
groups["gather_into"].gather_into(whole, own)
assert whole.tolist() == [1.0, 3.0, 5.0, 7.0]
world.everybody.barrier()
if rank == 1:
    time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGKILL if end == "killed" else signal.SIGSTOP)
if end == "frozen":
    threading.Timer(2.0, world.cut).start()
freed_s, started = {}, time.perf_counter()

def run(name):
    try:
        with failures_as_lost_peers(name):
            operations[name](groups[name])
    except PeerLostError:
        freed_s[name] = time.perf_counter() - started

threads = [threading.Thread(target=run, args=(name,), daemon=True) for name in operations]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(20)
print(json.dumps([sorted(operations), freed_s]), flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("end", ["killed", "frozen"])
def test_every_operation_ends_with_the_peers_connection_or_with_the_view(end: str) -> None:
    """The first without a cut: who waits is who tells the others of it."""
    operations, freed_s = run_pair(ENDING, end)
    assert sorted(freed_s) == operations, "each was freed"
    earliest = 0.5 if end == "killed" else 1.9
    assert all(earliest < seconds < earliest + 5 for seconds in freed_s.values()), freed_s
