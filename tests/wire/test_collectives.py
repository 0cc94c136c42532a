"""Each operation does what `ops` says, in real processes over Gloo, and the bytes it counts are those it sends."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from typing import Any

import pytest

from shoal.errors import PeerLostError
from shoal.wire.groups import failures_as_lost_peers

WORLD_SIZE = 3
WORKER = """
import json, os, sys, time
import torch
from shoal.errors import PeerLostError
from shoal.ops import WORLD, AllGather, AllReduce, AllToAll, Barrier, Broadcast
from shoal.wire.collectives import TorchTransport
from shoal.wire.rendezvous import connect, identity_from, join
from shoal.wire.traffic import Traffic

membership = join(identity_from(os.environ), {}, timeout_s=60.0)
cpu, rank = torch.device("cpu"), membership.identity.rank
world = connect(membership, cpu)
everybody = TorchTransport(world.group("lane", [0, 1, 2]), cpu)
if rank != 1:
    outer = TorchTransport(world.group("lane", [0, 2]), cpu)
alone = TorchTransport(world.group("lane", [rank]), cpu)
seen = {}

def note(name, transport, op, value):
    transport.traffic = Traffic()
    answer = transport.perform(op)
    seen[name] = [value(answer).tolist(), transport.traffic.to_plain()]

def own(n, dtype=torch.float32):
    return torch.arange(n, dtype=dtype) + 100 * rank

for n in (0, 1, 997):
    x = own(n)
    note(f"in place {n}", everybody, AllReduce(x, x, WORLD), lambda _: x)
x, y = own(7, torch.float64), torch.full((7,), -1.0, dtype=torch.float64)
note("into another", everybody, AllReduce(x, y, WORLD), lambda _: y)
x1 = own(5)
note("alone", alone, AllReduce(x1, x1, WORLD), lambda _: x1)
if rank != 1:
    x2 = own(5)
    note("outer sum", outer, AllReduce(x2, x2, WORLD), lambda _: x2)
    x3 = own(5)
    note("outer broadcast", outer, Broadcast(x3, 1, WORLD), lambda _: x3)
for root in range(3):
    b = own(5)
    note(f"broadcast {root}", everybody, Broadcast(b, root, WORLD), lambda _: b)
a = torch.arange(6, dtype=torch.float32).view(3, 2) + 100 * rank
note("all to all", everybody, AllToAll(a, WORLD), lambda rows: rows)
g = (own(5) % 256).to(torch.uint8)
note("all gather", everybody, AllGather(g, WORLD), lambda rows: rows)
note("barrier", everybody, Barrier(WORLD), lambda _: torch.zeros(0))
memory = everybody.allocate(11, torch.float64)
same = memory.source is memory.target and not memory.source.any() and memory.portion == slice(0, 11)
seen["memory"] = [same, 0]
seen["sum over world"] = [world.sum([rank + 0.5, 2.0**60, 0.1]), 0]
print(json.dumps(seen), flush=True)
if rank == 1:
    os._exit(0)
started = time.perf_counter()
try:
    for _ in range(3):
        everybody.perform(AllReduce(x, x, WORLD))
except PeerLostError as error:
    print(json.dumps([str(error), time.perf_counter() - started]), flush=True)
os._exit(0)
"""


@pytest.fixture(scope="module")
def seen() -> list[list[Any]]:
    """For each rank what every operation gave, and how losing rank 1 looked."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(16)
    processes = []
    for rank in range(WORLD_SIZE):
        env = {
            "RANK": str(rank),
            "WORLD_SIZE": str(WORLD_SIZE),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(listener.getsockname()[1]),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }
        if rank == 0:
            env["SHOAL_LISTEN_FD"] = str(listener.fileno())
        pass_fds = [listener.fileno()] if rank == 0 else []
        command = [sys.executable, "-c", WORKER]
        processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, pass_fds=pass_fds))
    listener.close()
    try:
        outputs = [process.communicate(timeout=90)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [[json.loads(line) for line in output.splitlines()] for output in outputs]


def results(seen: list[list[Any]], name: str) -> list[Any]:
    return [rank[0][name][0] for rank in seen if name in rank[0]]


def sent(seen: list[list[Any]], name: str) -> list[dict[str, list[int]]]:
    """For each rank: to rank -> [messages, bytes]."""
    return [rank[0][name][1] for rank in seen if name in rank[0]]


@pytest.mark.parametrize(
    ("num_values", "messages"),
    [
        (0, [{}, {}, {}]),
        (1, [{"2": [1, 4]}, {"0": [1, 4]}, {"1": [2, 8]}]),  # as seen on the sockets of Gloo
        (997, [{"2": [4, 5324]}, {"0": [4, 5304]}, {"1": [4, 5324]}]),  # likewise
    ],
)
def test_a_sum_in_place_is_exact_on_every_rank(
    seen: list[list[Any]], num_values: int, messages: list[dict[str, list[int]]]
) -> None:
    expected = [3.0 * i + 300 for i in range(num_values)]
    assert results(seen, f"in place {num_values}") == [expected] * 3
    assert sent(seen, f"in place {num_values}") == messages


def test_a_sum_may_go_into_other_memory(seen: list[list[Any]]) -> None:
    assert results(seen, "into another") == [[3.0 * i + 300 for i in range(7)]] * 3
    assert sent(seen, "into another") == [{"2": [3, 80]}, {"0": [2, 56]}, {"1": [3, 88]}]


def test_a_rank_alone_keeps_its_values_and_sends_nothing(seen: list[list[Any]]) -> None:
    assert results(seen, "alone") == [[100.0 * rank + i for i in range(5)] for rank in range(3)]
    assert sent(seen, "alone") == [{}, {}, {}]


def test_a_group_of_some_ranks_leaves_the_others_out(seen: list[list[Any]]) -> None:
    assert results(seen, "outer sum") == [[2.0 * i + 200 for i in range(5)]] * 2
    assert sent(seen, "outer sum") == [{"2": [2, 20]}, {"0": [2, 20]}]


def test_a_root_is_counted_within_its_group(seen: list[list[Any]]) -> None:
    assert results(seen, "outer broadcast") == [[200.0 + i for i in range(5)]] * 2
    assert sent(seen, "outer broadcast") == [{}, {"0": [1, 20]}]


@pytest.mark.parametrize("root", range(WORLD_SIZE))
def test_a_broadcast_gives_everybody_the_roots_values(seen: list[list[Any]], root: int) -> None:
    assert results(seen, f"broadcast {root}") == [[100.0 * root + i for i in range(5)]] * 3
    others = {str(rank): [1, 20] for rank in range(3) if rank != root}
    assert sent(seen, f"broadcast {root}") == [others if rank == root else {} for rank in range(3)]


def test_all_to_all_sends_row_r_to_rank_r(seen: list[list[Any]]) -> None:
    expected = [[[100.0 * sender + 2 * rank + i for i in range(2)] for sender in range(3)] for rank in range(3)]
    assert results(seen, "all to all") == expected
    others = [[other for other in range(3) if other != rank] for rank in range(3)]
    assert sent(seen, "all to all") == [{str(other): [1, 2 * 4] for other in there} for there in others]


def test_all_gather_collects_in_order_of_rank(seen: list[list[Any]]) -> None:
    assert results(seen, "all gather") == [[[100 * rank + i for i in range(5)] for rank in range(3)]] * 3
    assert sent(seen, "all gather") == [{str((rank + 1) % 3): [2, 5 * 2]} for rank in range(3)]


def test_a_barrier_sends_no_payload(seen: list[list[Any]]) -> None:
    assert sent(seen, "barrier") == [{}, {}, {}]


def test_memory_is_this_ranks_own_zeroed_and_reduced_in_place(seen: list[list[Any]]) -> None:
    assert results(seen, "memory") == [True] * 3


def test_small_sums_are_made_in_float64(seen: list[list[Any]]) -> None:
    assert results(seen, "sum over world") == [[4.5, 3 * 2.0**60, pytest.approx(0.3, rel=1e-15)]] * 3


def test_a_rank_that_ends_is_noticed_at_once_and_named_as_lost(seen: list[list[Any]]) -> None:
    for rank in (0, 2):
        message, took_s = seen[rank][1]
        assert "AllReduce over ranks [0, 1, 2] failed, most likely because another rank ended" in message
        assert took_s < 10.0


@pytest.mark.parametrize("reason", ["gone", "gone\nwith a long\nC++ backtrace", ""])
def test_a_failed_collective_is_a_lost_peer_in_one_line(reason: str) -> None:
    with pytest.raises(PeerLostError) as lost, failures_as_lost_peers("talking"):
        raise RuntimeError(reason)
    assert str(lost.value).startswith("talking failed, most likely because another rank ended")
    assert "\n" not in str(lost.value)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(ZeroDivisionError), failures_as_lost_peers("dividing"):
        _ = 1 / 0
    with failures_as_lost_peers("nothing"):
        pass
