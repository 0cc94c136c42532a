"""Dense parameters on real servers train as in one process."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from server_clients import SHAPES, client, gradient, initial, reference, train
from server_processes import servers
from shoal.errors import ServerRefusedError
from shoal.ops import Pull, Push
from shoal.strategy.sync.sharding import assign


@pytest.mark.parametrize("num_servers", [1, 3])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
def test_bsp_equals_one_process(optimizer: str, num_servers: int, tmp_path: Path) -> None:
    workers, steps = 3, 5
    with servers(tmp_path, num_servers, optimizer=optimizer, workers=list(range(workers))) as cluster:
        with client(cluster.addresses) as first:
            first.load(initial())
        results: list[Any] = [None] * workers
        threads = [
            threading.Thread(target=train, args=(cluster.addresses, rank, steps, results)) for rank in range(workers)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    expected = reference(optimizer, workers, steps)
    for result in results:
        for name, value in expected.items():
            torch.testing.assert_close(result[name], value, rtol=1e-10, atol=1e-10)


def test_push_and_pull_are_operations(tmp_path: Path) -> None:
    with servers(tmp_path, optimizer="count") as cluster, client(cluster.addresses) as worker:
        worker.load(initial())
        assert worker.perform(Push(initial(), 0)) is None
        values = worker.perform(Pull(list(SHAPES), 1))
        for name, value in initial().items():
            torch.testing.assert_close(values[name], 2 * value)
        assert worker.bytes_sent >= 2 * sum(value.numel() * 8 for value in initial().values())


def test_a_pull_fills_the_tensors_it_is_given(tmp_path: Path) -> None:
    with servers(tmp_path) as cluster, client(cluster.addresses) as worker:
        worker.load(initial())
        targets = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
        values = worker.pull(list(SHAPES), 0, into=targets).result()
        for name, value in initial().items():
            assert values[name] is targets[name]
            torch.testing.assert_close(targets[name], value)


def test_a_push_and_its_pull_go_piece_by_piece(tmp_path: Path) -> None:
    with servers(tmp_path, 2, optimizer="count") as cluster, client(cluster.addresses) as worker:
        worker.load(initial())
        for clock in range(3):
            pushed, pulled = worker.push_pull(initial(), clock)
            values = pulled.result()
            pushed.result()
            assert worker.read_clock == clock + 1
            for name, value in initial().items():
                torch.testing.assert_close(values[name], (clock + 2) * value)


def test_state_goes_out_and_comes_back(tmp_path: Path) -> None:
    """Dump from one set of servers, restore on another: training goes on bit by bit."""
    ends = []
    for interrupted in (False, True):
        values: dict[str, torch.Tensor] = {}
        state: Any = None
        for part in ([range(6)], [range(3), range(3, 6)])[interrupted]:
            with servers(tmp_path, 2, optimizer="adamw") as cluster, client(cluster.addresses) as worker:
                if state is None:
                    worker.load(initial())
                else:
                    worker.restore(state, clock=part.start)
                for clock in part:
                    values = worker.pull(list(SHAPES), clock).result()
                    worker.push(gradient(values, 0, clock), clock).result()
                values = worker.pull(list(SHAPES), part.stop).result()
                state = worker.dump()
        ends.append(values)
    for name in SHAPES:
        assert torch.equal(ends[0][name], ends[1][name])


@pytest.mark.parametrize(
    ("update", "words"),
    [
        ({"bias": torch.zeros(36, dtype=torch.float64)}, "expected (37,)"),
        ({"bias": torch.zeros(37)}, "expected (37,) torch.float64"),
        ({"other": torch.zeros(1)}, "'other' lies on no server"),
    ],
)
def test_an_update_that_does_not_fit_is_refused_with_the_reason(update: Any, words: str, tmp_path: Path) -> None:
    layout = assign(SHAPES, dict.fromkeys(SHAPES, 8), 1, replicate=False)
    with servers(tmp_path) as cluster, client(cluster.addresses, layout=layout) as worker:
        worker.load(initial())
        with pytest.raises(ServerRefusedError) as caught:
            worker.push(update, 0).result()
        assert words in str(caught.value)
        worker.pull(["bias"], 0).result()  # the server lives on


def test_a_key_that_was_not_loaded_is_refused(tmp_path: Path) -> None:
    with (
        servers(tmp_path) as cluster,
        client(cluster.addresses) as worker,
        pytest.raises(ServerRefusedError, match=r"server 0 at tcp://.* does not hold 'bias"),
    ):
        worker.pull(["bias"], 0).result()
