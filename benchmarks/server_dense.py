"""A dense push and pull against one parameter server on loopback, beside what else moves the same bytes.

    python benchmarks/server_dense.py [--sizes 16,64] [--rounds 12] [--pieces 2]

A round pushes an update of so many MB and has the new values back: by Shoal (whose server takes a step of SGD on it),
by a raw TCP echo (no work at all: what the loopback gives), by torch RPC and by a Ray actor (both add the update to a
tensor; on one machine they may use shared memory instead of the network). Rounds alternate in one run.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from harness import spread, store, table
from shoal.servers import ClientConfig, Server, ServerClient, ServerConfig
from shoal.strategy.sync.sharding import assign

Round = Callable[[torch.Tensor], torch.Tensor]
_SPAWN = multiprocessing.get_context("spawn")
_STATE: dict[int, torch.Tensor] = {}


@contextlib.contextmanager
def process(target: Callable[..., None], *arguments: Any) -> Iterator[Any]:
    """Run `target(pipe, *arguments)` beside us; yields our end of the pipe."""
    ours, theirs = _SPAWN.Pipe()
    child = _SPAWN.Process(target=target, args=(theirs, *arguments), daemon=True)
    child.start()
    try:
        yield ours
    finally:
        child.kill()
        child.join()


def shoal_server(pipe: Any) -> None:
    torch.set_num_threads(1)
    server = Server(
        ServerConfig(index=0, workers=(0,), mode="async"), lambda parameters: torch.optim.SGD(parameters, lr=0.1)
    )
    pipe.send(server.address)
    server.serve([server.address])


@contextlib.contextmanager
def by_shoal(num_values: int, piece_bytes: int) -> Iterator[Round]:
    shape = (num_values // 1024, 1024)
    with process(shoal_server) as pipe:
        pieces = assign({"weight": shape}, {"weight": 4}, 1, replicate=False, piece_bytes=piece_bytes)
        client = ServerClient(ClientConfig(addresses=(pipe.recv(),), rank=0), pieces)
        client.load({"weight": torch.zeros(shape)})
        values, clock = torch.zeros(shape), 0

        def one_round(update: torch.Tensor) -> torch.Tensor:
            nonlocal clock
            pushed, pulled = client.push_pull({"weight": update.view(shape)}, clock, into={"weight": values})
            clock += 1
            pulled.result()
            pushed.result()
            return values

        yield one_round
        client.close()


def echo_server(pipe: Any, size: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pipe.send(listener.getsockname())
        peer, _ = listener.accept()
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        buffer = memoryview(bytearray(size))
        while receive(peer, buffer):
            peer.sendall(buffer)


def receive(peer: socket.socket, buffer: memoryview) -> bool:
    at = 0
    while at < len(buffer):
        count = peer.recv_into(buffer[at:])
        if not count:
            return False
        at += count
    return True


@contextlib.contextmanager
def by_tcp(num_values: int) -> Iterator[Round]:
    with process(echo_server, num_values * 4) as pipe, socket.create_connection(pipe.recv()) as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        values = torch.zeros(num_values)
        target = memoryview(values.numpy()).cast("B")

        def one_round(update: torch.Tensor) -> torch.Tensor:
            peer.sendall(memoryview(update.numpy()).cast("B"))
            receive(peer, target)
            return values

        yield one_round


def add(update: torch.Tensor) -> torch.Tensor:
    values = _STATE.setdefault(update.numel(), torch.zeros_like(update))
    return values.add_(update, alpha=-0.1)


def rpc_server(pipe: Any, port: int) -> None:
    from torch.distributed import rpc

    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    rpc.init_rpc("server", rank=1, world_size=2)
    pipe.recv()


@contextlib.contextmanager
def by_torch_rpc() -> Iterator[Round]:
    from torch.distributed import rpc

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with process(rpc_server, port):
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        rpc.init_rpc("worker", rank=0, world_size=2)
        yield lambda update: rpc.rpc_sync("server", add, (update,))


@contextlib.contextmanager
def by_ray() -> Iterator[Round]:
    import ray

    class Holder:
        def __init__(self) -> None:
            self.values: dict[int, Any] = {}

        def add(self, update: Any) -> Any:
            values = self.values.setdefault(update.size, update * 0)
            values -= 0.1 * update
            return values

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    holder = ray.remote(Holder).remote()
    yield lambda update: ray.get(holder.add.remote(update.numpy()))
    ray.shutdown()


def measure(size_mb: int, rounds: int, pieces_mb: list[float], others: dict[str, Round]) -> dict[str, list[float]]:
    """Milliseconds of each round, by name."""
    num_values = size_mb * 1024 * 1024 // 4
    with contextlib.ExitStack() as stack:
        rivals = {"raw TCP echo": stack.enter_context(by_tcp(num_values))}
        for piece_mb in pieces_mb:
            rivals[f"shoal, pieces of {piece_mb:g} MB"] = stack.enter_context(
                by_shoal(num_values, int(piece_mb * 1024 * 1024))
            )
        rivals |= others
        update = torch.randn(num_values)
        times: dict[str, list[float]] = {name: [] for name in rivals}
        for number in range(rounds + 3):
            for name, one_round in rivals.items():
                start = time.perf_counter()
                one_round(update)
                if number >= 3:
                    times[name].append((time.perf_counter() - start) * 1e3)
    return times


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="16,64", help="MB a push")
    parser.add_argument("--pieces", default="2", help="MB a piece, several to compare")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--without", default="", help="names of rivals to leave out: `rpc,ray`")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, figures = [], {}
    pieces = [float(piece) for piece in options.pieces.split(",")]
    without = options.without.split(",")
    with contextlib.ExitStack() as stack:
        others: dict[str, Round] = {}
        if "rpc" not in without:
            others["torch RPC"] = stack.enter_context(by_torch_rpc())
        if "ray" not in without and importlib.util.find_spec("ray"):
            others["Ray actor"] = stack.enter_context(by_ray())
        elif "ray" not in without:
            print("Ray is not installed (pip install 'shoal[benchmarks]'): left out")
        for size in map(int, options.sizes.split(",")):
            times = measure(size, options.rounds, pieces, others)
            figures[f"{size} MB"] = times
            raw = statistics.median(times["raw TCP echo"])
            for name, values in times.items():
                rows.append([f"{size} MB", name, spread(values), f"{raw / statistics.median(values):.2f}"])
        print(table(["push + pull of", "by", "ms a round", "speed over raw TCP"], rows))
        print(f"stored in {store('server_dense', figures)}", flush=True)
    os._exit(0)  # torch RPC's own shutdown waits for a server that has been ended


if __name__ == "__main__":
    main()
