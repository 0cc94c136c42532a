"""A lane performs exchanges one after the other, in the order they were submitted, beside the thread that submits."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from shoal.engine.exchange.communicator import Lane, perform
from shoal.errors import PeerLostError
from shoal.ops import NODE, WORLD, AllGather, Barrier, Exchange, Op
from shoal.wire.traffic import Traffic
from shoal.wire.transport import Memory, private_memory

CPU = torch.device("cpu")


class Recorder:
    """A transport that notes what it is asked for; `gate` holds the first operation back."""

    is_stuck = False

    def __init__(self, name: str, log: list[tuple[str, Op]], gate: threading.Event | None = None) -> None:
        self.traffic = Traffic()
        self.closed = False
        self._name, self._log, self._gate = name, log, gate

    def allocate(self, num_values: int, dtype: torch.dtype) -> Memory:
        return private_memory(num_values, dtype, CPU)

    def perform(self, op: Op) -> Any:
        if self._gate is not None:
            assert self._gate.wait(10)
        if isinstance(op, AllGather) and op.tensor is None:
            raise PeerLostError("rank 1 is gone")
        self._log.append((self._name, op))
        self.traffic.record([(1, 10)])
        return len(self._log)

    def close(self) -> None:
        self.closed = True


def barriers(count: int, group: str = WORLD) -> Exchange:
    answers = []
    for _ in range(count):
        answers.append((yield Barrier(group)))
    return answers


def test_an_exchange_gets_each_operations_result_from_its_groups_transport() -> None:
    log: list[tuple[str, Op]] = []

    def exchange() -> Exchange:
        first = yield Barrier(NODE)
        second = yield Barrier(WORLD)
        return first, second

    transports = {NODE: Recorder("node", log), WORLD: Recorder("world", log)}
    assert perform(exchange(), transports) == (1, 2)
    assert log == [("node", Barrier(NODE)), ("world", Barrier(WORLD))]


def test_an_exchange_without_operations_returns_its_value() -> None:
    assert perform(barriers(0), {}) == []


def test_exchanges_are_performed_in_the_order_of_their_submission() -> None:
    gate, log = threading.Event(), []  # type: ignore[var-annotated]
    lane = Lane({WORLD: Recorder("world", log, gate)}, CPU)
    futures = [lane.submit(barriers(count)) for count in (2, 1, 3)]
    assert not any(future.done() for future in futures)  # the caller did not have to wait
    gate.set()
    assert [lane.wait(future) for future in reversed(futures)] == [[4, 5, 6], [3], [1, 2]]
    assert lane.bytes_sent == 60
    assert lane.traffic == Traffic({1: (6, 60)})
    lane.close()


def test_what_goes_wrong_in_an_exchange_is_raised_where_it_is_waited_for() -> None:
    log: list[tuple[str, Op]] = []
    lane = Lane({WORLD: Recorder("world", log)}, CPU)

    def failing() -> Exchange:
        yield AllGather(None, WORLD)

    future = lane.submit(failing())
    with pytest.raises(PeerLostError, match="rank 1 is gone"):
        lane.wait(future)
    with pytest.raises(PeerLostError, match="an exchange before this one failed: rank 1 is gone"):
        lane.wait(lane.submit(barriers(1)))  # others wait for what comes of the first one: they must not get this
    assert log == []
    lane.close()


def test_closing_drops_what_is_queued_and_closes_the_transports() -> None:
    gate, log = threading.Event(), []  # type: ignore[var-annotated]
    transport = Recorder("world", log, gate)
    lane = Lane({WORLD: transport}, CPU)
    running, queued = lane.submit(barriers(1)), lane.submit(barriers(1))
    lane.close()
    assert queued.cancelled()
    assert transport.closed
    gate.set()
    assert running.result(10) == [1]


def test_a_thread_that_waits_in_vain_holds_up_neither_who_waits_for_it_nor_who_closes() -> None:
    gate, log = threading.Event(), []  # type: ignore[var-annotated]
    transport = Recorder("world", log, gate)
    lane = Lane({WORLD: transport}, CPU)
    future = lane.submit(barriers(1))
    transport.is_stuck = True
    with pytest.raises(PeerLostError, match="will never be whole"):
        lane.wait(future)
    lane.close(wait=True)
    assert transport.closed
    gate.set()
