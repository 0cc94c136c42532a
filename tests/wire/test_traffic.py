"""What an operation sends by the formula is what three real processes count where they send it, for every exchange."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.ops import WORLD, AllGather, AllReduce, AllToAll, Barrier, Broadcast, Exchange, Op, SendRecv
from shoal.plan import parse_plan
from shoal.plan.parts import build_coder, build_sync
from shoal.strategy.bucket import Bucket, Piece
from shoal.strategy.codec import CODECS
from shoal.strategy.sync.algorithms import ALGORITHMS
from shoal.strategy.topology import topologies
from shoal.wire.pricing import Links, price_rank, rounds_of, seconds, traffic_of
from shoal.wire.traffic import Traffic, messages_of, total
from shoal.wire.transport import private_memory

PLANS = {
    **{f"algorithm {name}": f'sync.algorithm = "{name}"\n' for name in ALGORITHMS},
    **{f"codec {name}": f'codec.kind = "{name}"\n' for name in CODECS},
}
SHAPES = ((30, 20), (7,), (0, 3), (50, 10), (1,))
EXCHANGES = 2
WORKER = """
import json, os, sys
import torch
from shoal.engine.exchange.communicator import perform
from shoal.ops import WORLD, Barrier
from shoal.wire.collectives import TorchTransport
from shoal.wire.rendezvous import connect, identity_from, join
from shoal.wire.traffic import Traffic

sys.path.insert(0, os.environ["TESTS"])
from test_traffic import EXCHANGES, PLANS, sync_and_bucket

membership = join(identity_from(os.environ), {}, timeout_s=60.0)
cpu, rank = torch.device("cpu"), membership.identity.rank
world = connect(membership, cpu)
transport = TorchTransport(world.group("lane", [0, 1, 2]), cpu)
seen = {}
for name, plan in PLANS.items():
    transport.traffic = Traffic()
    sync, bucket = sync_and_bucket(plan, rank, cpu)
    for _ in range(EXCHANGES):
        bucket.source.normal_()
        perform(sync.exchange(bucket), {WORLD: transport})
    seen[name] = transport.traffic.to_plain()
print(json.dumps(seen), flush=True)
transport.perform(Barrier(WORLD))
os._exit(0)
"""


def sync_and_bucket(plan: str, rank: int, device: torch.device) -> tuple[Any, Bucket]:
    """One rank's part of a plan, and a bucket with awkward parameters and a flag for each."""
    parsed, view = parse_plan(plan, origin="test"), topologies("abc")[rank]
    pieces, end = [], 0
    for shape in SHAPES:
        pieces.append(Piece(end, torch.Size(shape)))
        end += -(-torch.Size(shape).numel() // 16) * 16
    memory = private_memory(end + len(SHAPES), torch.float32, device)
    return build_sync(parsed, view, build_coder(parsed, view)), Bucket.over("bucket", memory, end, tuple(pieces))


@pytest.fixture(scope="module")
def counted() -> list[dict[str, Any]]:
    """For each of three real ranks, what each plan's exchanges sent."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(16)
    processes = []
    for rank in range(3):
        env = {
            "RANK": str(rank),
            "WORLD_SIZE": "3",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(listener.getsockname()[1]),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "TESTS": os.path.dirname(__file__),
        }
        if rank == 0:
            env["SHOAL_LISTEN_FD"] = str(listener.fileno())
        command = [sys.executable, "-c", WORKER]
        pass_fds = [listener.fileno()] if rank == 0 else []
        processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, pass_fds=pass_fds))
    listener.close()
    try:
        outputs = [process.communicate(timeout=50)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [json.loads(output) for output in outputs]


def members(_: int, group: str) -> list[int]:
    assert group == WORLD
    return [0, 1, 2]


@pytest.mark.parametrize("name", PLANS)
def test_an_exchange_without_values_counts_what_real_ranks_send(counted: list[dict[str, Any]], name: str) -> None:
    predicted = [Traffic() for _ in range(3)]
    parts = [sync_and_bucket(PLANS[name], rank, torch.device("meta")) for rank in range(3)]
    for _ in range(EXCHANGES):
        rounds = rounds_of([sync.exchange(bucket) for sync, bucket in parts], members)
        for whole, once in zip(predicted, traffic_of(rounds, 3), strict=True):
            whole.merge(once)
    assert [Traffic.from_plain(rank[name]) for rank in counted] == predicted
    for rank, (sync, bucket) in enumerate(sync_and_bucket(PLANS[name], r, torch.device("meta")) for r in range(3)):
        alone = total(price_rank(sync.exchange(bucket), rank, members) for _ in range(EXCHANGES))
        assert alone == predicted[rank]


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def sent_by_all(ops: list[Op]) -> list[Traffic]:
    traffic = [Traffic() for _ in ops]
    for index, op in enumerate(ops):
        traffic[index].record(messages_of(op, index, range(len(ops))))
    return traffic


def received(traffic: list[Traffic]) -> list[int]:
    return [sum(one.sent.get(rank, (0, 0))[1] for one in traffic) for rank in range(len(traffic))]


@given(
    size=st.integers(1, 9), num_values=st.integers(0, 3_000_000), dtype=st.sampled_from([torch.uint8, torch.float64])
)
def test_a_ring_carries_every_part_all_but_one_time_each_way(size: int, num_values: int, dtype: torch.dtype) -> None:
    tensor = meta(num_values, dtype=dtype)
    traffic = sent_by_all([AllReduce(tensor, tensor, WORLD)] * size)
    assert sum(one.bytes_sent for one in traffic) == 2 * (size - 1) * num_values * dtype.itemsize
    for rank, one in enumerate(traffic):
        assert set(one.sent) <= {(rank - 1) % size} - {rank}
        assert sum(messages for messages, _ in one.sent.values()) <= 2 * (size - 1)
        assert all(size_bytes % dtype.itemsize == 0 for _, size_bytes in one.sent.values())


@given(size=st.integers(1, 17), data=st.data())
def test_a_broadcast_reaches_everybody_once(size: int, data: st.DataObject) -> None:
    root = data.draw(st.integers(0, size - 1))
    traffic = sent_by_all([Broadcast(meta(5), root, WORLD)] * size)
    assert received(traffic) == [0 if rank == root else 20 for rank in range(size)]


@given(size=st.integers(1, 6), length=st.integers(0, 5))
def test_rows_and_gathers_reach_everybody_once(size: int, length: int) -> None:
    rows = sent_by_all([AllToAll(meta(size, length), WORLD)] * size)
    assert received(rows) == [(size - 1) * 4 * length] * size
    gathered = sent_by_all([AllGather(meta(length), WORLD)] * size)
    assert received(gathered) == [(size - 1) * 4 * length] * size


def test_members_are_named_by_their_global_ranks() -> None:
    assert messages_of(SendRecv(meta(3), 1, None, None, WORLD), 0, [4, 7]) == [(7, 12)]
    assert messages_of(AllGather(meta(3), WORLD), 1, [4, 7]) == [(4, 12)]
    assert messages_of(SendRecv(None, None, meta(3), 1, WORLD), 0, [4, 7]) == []
    assert messages_of(SendRecv(meta(0), 1, None, None, WORLD), 0, [4, 7]) == []
    assert messages_of(Barrier(WORLD), 0, [4, 7]) == []


def test_counts_add_up_and_survive_json() -> None:
    one, other = Traffic({1: (2, 10)}), Traffic()
    other.record([(1, 5), (2, 7), (3, 0)])
    assert other.sent == {1: (1, 5), 2: (1, 7)}
    one.merge(other, times=3)
    assert one.sent == {1: (5, 25), 2: (3, 21)}
    assert one.bytes_sent == 46
    assert Traffic.from_plain(json.loads(json.dumps(one.to_plain()))) == one
    other.merge(one, times=0)
    assert other.sent == {1: (1, 5), 2: (1, 7)}


def chain(rank: int, size: int) -> Exchange:
    """Each rank passes ten values on when it has them from the one before."""
    if rank > 0:
        yield SendRecv(None, None, meta(10), rank - 1, WORLD)
    if rank < size - 1:
        yield SendRecv(meta(10), rank + 1, None, None, WORLD)


def test_what_waits_for_a_message_leaves_in_a_later_round() -> None:
    rounds = rounds_of([chain(rank, 3) for rank in range(3)], members)
    assert rounds == [((0, 1, 40),), ((1, 2, 40),)]
    assert seconds(rounds, Links("abc", {"b": 40.0}, 0.5)) == 2 * (1.0 + 0.5)
    assert seconds(rounds, Links("aab", {"b": 40.0}, 0.5)) == 1.0 + 0.5


def waits(source: int) -> Iterator[Op]:
    yield SendRecv(None, None, meta(1), source, WORLD)


def test_ranks_that_wait_for_each_other_are_told() -> None:
    with pytest.raises(AssertionError, match="wait for each other"):
        rounds_of([waits(1), waits(0)], lambda rank, group: [0, 1])


def test_ranks_that_come_to_different_operations_are_told() -> None:
    def one(op: Op) -> Exchange:
        yield op

    with pytest.raises(AssertionError, match="different operations"):
        rounds_of([one(Barrier(WORLD)), one(AllGather(meta(1), WORLD))], lambda rank, group: [0, 1])
