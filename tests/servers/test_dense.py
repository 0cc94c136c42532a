"""Dense parameters on real servers train as in one process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from server_processes import OPTIMIZERS, servers
from shoal.errors import ServerRefusedError
from shoal.ops import Pull, Push
from shoal.servers import ClientConfig, ServerClient
from shoal.strategy.sync.sharding import assign

SHAPES: dict[str, tuple[int, ...]] = {
    "weight": (37, 5),
    "bias": (37,),
    "scalar": (),
    "one": (1,),
    "empty": (0, 3),
    "wide": (3, 1000),
}


def pieces(num: int = 1, *, replicate: bool = False, piece_bytes: int = 256) -> Any:
    return assign(SHAPES, dict.fromkeys(SHAPES, 8), num, replicate=replicate, piece_bytes=piece_bytes)


@contextmanager
def client(addresses: tuple[str, ...], rank: int = 0, layout: Any = None, **config: Any) -> Iterator[ServerClient]:
    settings = {"lost_after_s": 0.5, "timeout_s": 30.0, "connect_timeout_s": 10.0, **config}
    made = ServerClient(ClientConfig(addresses=addresses, rank=rank, **settings), layout or pieces(len(addresses)))
    try:
        yield made
    finally:
        made.close()


def initial() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, dtype=torch.float64, generator=generator) for name, shape in SHAPES.items()}


def gradient(values: dict[str, torch.Tensor], rank: int, clock: int) -> dict[str, torch.Tensor]:
    """Depends on the values, so that a stale read shows."""
    return {name: (value.sin() + 0.1 * rank + 0.01 * clock) / (rank + 1) for name, value in values.items()}


def reference(optimizer: str, num_workers: int, steps: int) -> dict[str, torch.Tensor]:
    parameters = {name: nn.Parameter(value) for name, value in initial().items()}
    steps_with = OPTIMIZERS[optimizer](list(parameters.values()))
    for clock in range(steps):
        values = {name: p.detach() for name, p in parameters.items()}
        grads = [gradient(values, rank, clock) for rank in range(num_workers)]
        for name, parameter in parameters.items():
            parameter.grad = sum(grad[name] for grad in grads)
        steps_with.step()
    return {name: p.detach() for name, p in parameters.items()}


def train(addresses: tuple[str, ...], rank: int, steps: int, results: list[Any]) -> None:
    with client(addresses, rank) as worker:
        values = worker.pull(list(SHAPES), 0).result()
        for clock in range(steps):
            grads = gradient(values, rank, clock)
            pushed = worker.push(grads, clock)
            values = worker.pull(list(SHAPES), clock + 1).result()
            pushed.result()
        results[rank] = values


@pytest.mark.parametrize("num_servers", [1, 3])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
def test_bsp_equals_one_process(optimizer: str, num_servers: int, tmp_path: Path) -> None:
    workers, steps = 3, 5
    with servers(tmp_path, num_servers, optimizer=optimizer, workers=range_list(workers)) as cluster:
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


def range_list(num: int) -> list[int]:
    return list(range(num))


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
    with servers(tmp_path) as cluster, client(cluster.addresses) as worker:
        with pytest.raises(ServerRefusedError, match="server 0 at tcp://.* does not hold 'bias"):
            worker.pull(["bias"], 0).result()
