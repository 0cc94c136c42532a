"""Workers for tests of parameter servers: clients, a little model, its reference in one process, a relay that cuts."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from server_processes import OPTIMIZERS
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
def client(
    addresses: tuple[str, ...], rank: int = 0, layout: Any = None, log: Any = None, **config: Any
) -> Iterator[ServerClient]:
    settings = {"lost_after_s": 0.5, "timeout_s": 30.0, "connect_timeout_s": 10.0, **config}
    own = pieces(len(addresses)) if layout is None else layout
    made = ServerClient(
        ClientConfig(addresses=addresses, rank=rank, **settings), own, log=log or (lambda *_, **__: None)
    )
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


def train(
    addresses: tuple[str, ...], rank: int, steps: int, results: list[Any], layout: Any = None, after_step: Any = None
) -> None:
    """One worker of bsp; `after_step(rank, clock)` is called when a step's update is on its way."""
    with client(addresses, rank, layout) as worker:
        values = worker.pull(list(SHAPES), 0).result()
        for clock in range(steps):
            grads = gradient(values, rank, clock)
            pushed = worker.push(grads, clock)
            if after_step is not None:
                after_step(rank, clock)
            values = worker.pull(list(SHAPES), clock + 1).result()
            pushed.result()
        results[rank] = values


class Relay:
    """A TCP relay to `address`, which `cut` breaks: connections made afterwards work again."""

    def __init__(self, address: str) -> None:
        host, port = address.removeprefix("tcp://").split(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Break every connection, in the middle of whatever it carries."""
        broken, self._sockets = self._sockets, []
        for end in broken:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                self._sockets += [near, far]
                for source, target in ((near, far), (far, near)):
                    threading.Thread(target=_copy, args=(source, target), daemon=True).start()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    for end in (source, target):
        end.close()
