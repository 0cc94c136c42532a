"""Ranks of one node, played by threads: sums are exact and equal everywhere, and nobody waits for the dead."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from shoal.errors import PeerLostError, RendezvousError
from shoal.ops import NODE, AllGather, AllReduce, Barrier, Broadcast
from shoal.wire import shared_memory
from shoal.wire.shared_memory import SharedMemoryTransport

pytestmark = pytest.mark.skipif(not shared_memory.available(), reason="this system cannot share memory")
TOKEN_BYTES = 16


class Store:
    """The key-value store of a node: `lookup` waits until somebody has published the key."""

    def __init__(self, timeout_s: float = 20.0) -> None:
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._timeout_s = timeout_s

    def publish(self, key: str, value: bytes) -> None:
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def lookup(self, key: str) -> bytes:
        with self._changed:
            assert self._changed.wait_for(lambda: key in self._values, self._timeout_s), f"nobody published {key}"
            return self._values[key]


Body = Callable[[SharedMemoryTransport], Any]


def play(size: int, body: Body, store: Store | None = None, timeout_s: float = 20.0) -> list[Any]:
    """Run `body` on `size` ranks at once; return what each returned."""
    shared = store or Store()

    def rank(index: int) -> Any:
        transport = SharedMemoryTransport(index, size, shared.publish, shared.lookup, timeout_s=timeout_s)
        try:
            return body(transport)
        finally:
            transport.close()

    with ThreadPoolExecutor(size) as pool:
        return [future.result() for future in [pool.submit(rank, index) for index in range(size)]]


def index_of(transport: SharedMemoryTransport) -> int:
    return transport._index


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_values", [0, 1, 997, 4096, 200_003])
def test_a_sum_is_exact_and_equal_on_every_rank(size: int, num_values: int) -> None:
    def body(transport: SharedMemoryTransport) -> list[torch.Tensor]:
        memory = transport.allocate(num_values, torch.float32)
        seen = []
        for step in range(3):  # whole numbers below 2**24: every order of the sum is exact
            memory.source.copy_(torch.arange(num_values) % 1000 + 10 * index_of(transport) + step)
            transport.perform(AllReduce(memory.source, memory.target, NODE))
            seen.append(memory.target.clone())
            transport.perform(Barrier(NODE))
        return seen

    results = play(size, body)
    for step in range(3):
        expected = sum(torch.arange(num_values) % 1000 + 10 * index + step for index in range(size))
        for result in results:
            assert torch.equal(result[step], expected.float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_float_type_is_summed(dtype: torch.dtype) -> None:
    def body(transport: SharedMemoryTransport) -> torch.Tensor:
        memory = transport.allocate(5003, dtype)
        memory.source.fill_(index_of(transport) + 1)
        transport.perform(AllReduce(memory.source, memory.target, NODE))
        return memory.target.clone()

    for result in play(3, body):
        assert torch.equal(result, torch.full((5003,), 6, dtype=dtype))


def test_two_runs_give_the_same_bits() -> None:
    def body(transport: SharedMemoryTransport) -> torch.Tensor:
        generator = torch.Generator().manual_seed(index_of(transport))
        memory = transport.allocate(100_003, torch.float32)
        memory.source.copy_(torch.randn(100_003, generator=generator))
        transport.perform(AllReduce(memory.source, memory.target, NODE))
        return memory.target.clone()

    first, second = play(4, body), play(4, body)
    assert all(torch.equal(result, first[0]) for result in [*first, *second])


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_values", [0, 1, 4097])
def test_the_portions_cover_the_target_once(size: int, num_values: int) -> None:
    def body(transport: SharedMemoryTransport) -> slice:
        return transport.allocate(num_values, torch.float64).portion

    portions = play(size, body)
    assert [place for portion in portions for place in range(portion.start, portion.stop)] == list(range(num_values))


def test_several_allocations_do_not_touch_each_other() -> None:
    def body(transport: SharedMemoryTransport) -> list[float]:
        memories = [transport.allocate(num_values, torch.float32) for num_values in (3, 0, 5000, 1)]
        for number, memory in enumerate(memories):
            memory.source.fill_(number + 1)
        for memory in reversed(memories):
            transport.perform(AllReduce(memory.source, memory.target, NODE))
        return [float(memory.target.sum()) for memory in memories]

    assert play(2, body) == [[6.0, 0.0, 30_000.0, 8.0]] * 2


@pytest.mark.parametrize("root", [0, 1, 2])
def test_what_the_root_wrote_is_visible_to_all_after_a_broadcast(root: int) -> None:
    def body(transport: SharedMemoryTransport) -> list[float]:
        memory = transport.allocate(3000, torch.float32)
        seen = []
        for step in range(5):
            if index_of(transport) == root:
                memory.target.fill_(step)
            transport.perform(Broadcast(memory.target, root, NODE))
            seen.append(float(memory.target.mean()))
            transport.perform(Barrier(NODE))
        return seen

    assert play(3, body) == [[0.0, 1.0, 2.0, 3.0, 4.0]] * 3


def test_nobody_passes_a_barrier_before_all_are_there() -> None:
    arrived: list[int] = []

    def body(transport: SharedMemoryTransport) -> int:
        time.sleep(0.05 * index_of(transport))
        arrived.append(index_of(transport))
        transport.perform(Barrier(NODE))
        return len(arrived)

    assert play(4, body) == [4, 4, 4, 4]


def test_nothing_is_sent_on_the_network() -> None:
    def body(transport: SharedMemoryTransport) -> int:
        memory = transport.allocate(1000, torch.float32)
        transport.perform(AllReduce(memory.source, memory.target, NODE))
        return transport.traffic.bytes_sent

    assert play(2, body) == [0, 0]


@pytest.mark.parametrize("what", ["sum", "barrier", "broadcast", "allocate"])
def test_a_peer_that_closes_is_noticed_at_once(what: str) -> None:
    def body(transport: SharedMemoryTransport) -> str:
        memory = transport.allocate(10, torch.float32)
        if index_of(transport) == 1:
            return ""
        attempt: Callable[[], object] = {
            "sum": lambda: transport.perform(AllReduce(memory.source, memory.target, NODE)),
            "barrier": lambda: transport.perform(Barrier(NODE)),
            "broadcast": lambda: transport.perform(Broadcast(memory.target, 1, NODE)),
            "allocate": lambda: transport.allocate(1, torch.float32),
        }[what]
        started = time.perf_counter()
        with pytest.raises(PeerLostError, match=r"local rank [02] lost local rank \d of the same node") as lost:
            attempt()
        assert time.perf_counter() - started < 5.0
        return str(lost.value)

    assert play(3, body)[1] == ""


@pytest.mark.parametrize("timeout_s", [0.25, 1.0])
def test_a_silent_peer_is_lost_when_the_time_is_up(timeout_s: float) -> None:
    over = threading.Event()

    def body(transport: SharedMemoryTransport) -> float:
        if index_of(transport) == 1:
            over.wait(20.0)
            return 0.0
        started = time.perf_counter()
        with pytest.raises(PeerLostError, match="local rank 0 lost local rank 1"):
            transport.perform(Barrier(NODE))
        over.set()
        return time.perf_counter() - started

    assert 0.9 * timeout_s < play(2, body, timeout_s=timeout_s)[0] < 10.0


def test_a_rank_that_never_comes_is_an_error_within_its_time() -> None:
    store = Store()
    started = time.perf_counter()
    with pytest.raises(RendezvousError, match="a rank of the same node did not connect within 1 s"):
        SharedMemoryTransport(0, 2, store.publish, store.lookup, timeout_s=1.0)
    assert time.perf_counter() - started < 5.0


def test_a_rank_that_is_gone_already_is_an_error() -> None:
    store = Store()
    store.publish("shared_memory/0", bytes(TOKEN_BYTES) + b"\0shoal-test-nobody-listens-here")
    with pytest.raises(RendezvousError, match="a rank of the same node cannot be reached"):
        SharedMemoryTransport(1, 2, store.publish, store.lookup, timeout_s=1.0)


class Strangers(Store):
    """A store under whose eyes somebody else connects to every rank before its peers do."""

    def __init__(self, greeting: bytes) -> None:
        super().__init__()
        self._greeting = greeting
        self.connections: list[socket.socket] = []

    def publish(self, key: str, value: bytes) -> None:
        stranger = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        stranger.connect(value[TOKEN_BYTES:])
        stranger.sendall(self._greeting)
        stranger.shutdown(socket.SHUT_WR)
        self.connections.append(stranger)
        super().publish(key, value)


@contextlib.contextmanager
def strangers(greeting: bytes) -> Iterator[Strangers]:
    store = Strangers(greeting)
    try:
        yield store
    finally:
        for connection in store.connections:
            connection.close()


@pytest.mark.parametrize("greeting", [b"", b"let me in", bytes(TOKEN_BYTES + 4), b"\xff" * 100])
def test_a_stranger_without_the_token_is_turned_away(greeting: bytes) -> None:
    def body(transport: SharedMemoryTransport) -> float:
        memory = transport.allocate(10, torch.float32)
        memory.source.fill_(1.0)
        transport.perform(AllReduce(memory.source, memory.target, NODE))
        return float(memory.target.sum())

    with strangers(greeting) as store:
        assert play(2, body, store) == [20.0, 20.0]
        for connection in store.connections:
            connection.settimeout(5.0)
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1) == b""


def test_an_operation_that_needs_a_network_is_our_own_mistake() -> None:
    def body(transport: SharedMemoryTransport) -> None:
        with pytest.raises(AssertionError, match="AllGather does not run over shared memory"):
            transport.perform(AllGather(torch.zeros(1), NODE))

    play(1, body)
