"""A sparse table on parameter servers beside Redis and torch RPC: a million rows of 64, batches of Zipf ids.

    python benchmarks/sparse_table.py [--rows 1000000] [--dim 64] [--batch 4096] [--rounds 40]

A round pulls the distinct rows of a batch and pushes as many gradients; Adagrad on the rows. Shoal's servers and the
torch RPC server (a plain tensor, `index_select` and `index_add_`) apply it themselves; Redis only stores bytes: there,
the worker computes new values and state and writes both back (pipelined MGET and MSET; with several workers it would
lose updates). Every rival starts with all rows present; rounds alternate in one run.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness import spread, store, table
from server_dense import process
from shoal.job.sparse_rows import TableSpec
from shoal.servers import ClientConfig, RemoteTable, Server, ServerClient, ServerConfig

Round = Callable[[Tensor], int]
LR = 0.05


def shoal_server(pipe: Any, index: int) -> None:
    torch.set_num_threads(1)
    config = ServerConfig(index=index, workers=(0,), mode="async")
    server = Server(config, lambda parameters: torch.optim.SGD(parameters, lr=LR))
    pipe.send(server.address)
    server.serve(pipe.recv())


@contextlib.contextmanager
def by_shoal(rows: int, dim: int, num_servers: int) -> Iterator[Round]:
    with contextlib.ExitStack() as stack:
        pipes = [stack.enter_context(process(shoal_server, index)) for index in range(num_servers)]
        addresses = tuple(pipe.recv() for pipe in pipes)
        for pipe in pipes:
            pipe.send(addresses)
        client = ServerClient(ClientConfig(addresses=addresses, rank=0))
        stack.callback(client.close)
        client.create_table("items", TableSpec(rows=rows, dim=dim, optimizer="adagrad", lr=LR))
        remote = RemoteTable(client, "items")
        for ids in torch.arange(rows).split(65536):
            remote.pull(ids)

        def one_round(ids: Tensor) -> int:
            values = remote.pull(ids)
            remote.push(ids, gradient(values))
            remote.wait()
            return 2 * ids.numel()

        yield one_round


def gradient(values: Tensor) -> Tensor:
    return values * 0.1


_TABLE: dict[str, Tensor] = {}


def rpc_make(rows: int, dim: int) -> None:
    _TABLE["values"], _TABLE["sum"] = torch.randn(rows, dim) * 0.01, torch.zeros(rows, dim)


def rpc_pull(ids: Tensor) -> Tensor:
    return _TABLE["values"].index_select(0, ids)


def rpc_push(ids: Tensor, gradients: Tensor) -> None:
    total = _TABLE["sum"].index_select(0, ids).addcmul_(gradients, gradients)
    _TABLE["sum"].index_copy_(0, ids, total)
    _TABLE["values"].index_add_(0, ids, gradients / total.sqrt_().add_(1e-10), alpha=-LR)


def rpc_server(pipe: Any, port: int) -> None:
    from torch.distributed import rpc

    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    rpc.init_rpc("server", rank=1, world_size=2)
    pipe.recv()


@contextlib.contextmanager
def by_torch_rpc(rows: int, dim: int) -> Iterator[Round]:
    from torch.distributed import rpc

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with process(rpc_server, port):
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        rpc.init_rpc("worker", rank=0, world_size=2)
        rpc.rpc_sync("server", rpc_make, (rows, dim))

        def one_round(ids: Tensor) -> int:
            values = rpc.rpc_sync("server", rpc_pull, (ids,))
            rpc.rpc_sync("server", rpc_push, (ids, gradient(values)))
            return 2 * ids.numel()

        yield one_round


@contextlib.contextmanager
def by_redis(rows: int, dim: int) -> Iterator[Round]:
    import redis

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        command = ["redis-server", "--port", str(port), "--save", "", "--appendonly", "no", "--dir", folder]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            client = redis.Redis(port=port)
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                with contextlib.suppress(redis.exceptions.ConnectionError):
                    client.ping()
                    break
                time.sleep(0.05)
            start = np.full((8192, 2 * dim), 0.01, dtype=np.float32)  # value and Adagrad's sum side by side
            for ids in np.split(np.arange(rows), range(8192, rows, 8192)):
                client.mset({str(i): start[0].tobytes() for i in ids.tolist()})

            def one_round(ids: Tensor) -> int:
                keys = [str(i) for i in ids.tolist()]
                found = np.frombuffer(bytearray(b"".join(client.mget(keys))), dtype=np.float32)
                both = torch.from_numpy(found).view(len(keys), 2, dim)
                values, total = both[:, 0], both[:, 1]
                gradients = gradient(values)
                total.addcmul_(gradients, gradients)
                values.addcdiv_(gradients, total.sqrt().add_(1e-10), value=-LR)
                raw, size = both.numpy().tobytes(), 2 * dim * 4
                pipeline = client.pipeline(transaction=False)
                pipeline.mset({key: raw[n * size : (n + 1) * size] for n, key in enumerate(keys)})
                pipeline.execute()
                return 2 * len(keys)

            yield one_round
            client.close()
        finally:
            server.kill()
            server.wait()


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    chance = np.random.default_rng(0)
    with contextlib.ExitStack() as stack:
        rivals: dict[str, Round] = {}
        for num_servers in (1, 2):
            rivals[f"shoal, {num_servers} server{'s' * (num_servers > 1)}"] = stack.enter_context(
                by_shoal(options.rows, options.dim, num_servers)
            )
        rivals["torch RPC"] = stack.enter_context(by_torch_rpc(options.rows, options.dim))
        if shutil.which("redis-server") and importlib.util.find_spec("redis"):
            rivals["Redis"] = stack.enter_context(by_redis(options.rows, options.dim))
        else:
            print("Redis is not installed (apt install redis-server; pip install 'shoal[benchmarks]'): left out")
        rates: dict[str, list[float]] = {name: [] for name in rivals}
        distinct = []
        for number in range(options.rounds + 5):
            # Ids by rank of a Zipf law, shuffled over the table by a multiplication.
            drawn = (chance.zipf(1.1, 4 * options.batch) - 1).astype(np.int64)
            drawn = drawn[drawn < options.rows][: options.batch] * 7919 % options.rows
            ids = torch.from_numpy(np.unique(drawn))
            distinct.append(ids.numel())
            for name, one_round in rivals.items():
                start = time.perf_counter()
                num_rows = one_round(ids)
                if number >= 5:
                    rates[name].append(num_rows / (time.perf_counter() - start) / 1e6)
        best = statistics.median(rates["shoal, 1 server"])
        rows = [[name, spread(v), f"{best / statistics.median(v):.2f}"] for name, v in rates.items()]
        print(f"{options.batch} ids a batch, {statistics.median(distinct):.0f} of them distinct")
        print(table(["by", "million rows a second", "shoal with 1 server is faster by"], rows))
        print(f"stored in {store('sparse_table', rates)}", flush=True)
    os._exit(0)  # torch RPC's own shutdown waits for a server that has been ended


if __name__ == "__main__":
    main()
