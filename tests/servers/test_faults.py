"""Servers that die, connections that break, messages that come twice: what is acknowledged is there, once."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from server_clients import SHAPES, Relay, client, initial, pieces, reference, train
from server_processes import servers
from shoal.errors import ServerLostError
from shoal.servers import RemoteTable
from shoal.strategy.sync.sharding import assign

LARGE = {"large": (64, 4096)}  # 1 MiB in float32


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_bsp_goes_on_exactly_when_a_server_is_killed(victim: int, tmp_path: Path) -> None:
    workers, steps, layout = 2, 6, pieces(3, replicate=True)
    with servers(tmp_path, 3, optimizer="adamw", workers=list(range(workers))) as cluster:
        with client(cluster.addresses, layout=layout) as first:
            first.load(initial())

        def kill_once(rank: int, clock: int) -> None:
            if (rank, clock) == (1, 2):
                cluster.kill(victim)

        results: list[Any] = [None] * workers
        threads = [
            threading.Thread(target=train, args=(cluster.addresses, rank, steps, results, layout, kill_once))
            for rank in range(workers)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        survivors = [index for index in range(3) if index != victim]
        assert sum(len(cluster.events(index, "promoted")) for index in survivors) > 0
        assert any(cluster.events(index, "replica_lost") for index in survivors)
    for name, value in reference("adamw", workers, steps).items():
        for result in results:
            torch.testing.assert_close(result[name], value, rtol=1e-10, atol=1e-10)


def test_what_was_acknowledged_survives_and_what_was_not_counts_once(tmp_path: Path) -> None:
    """Async with many updates under way when the primary of half of them dies."""
    layout = assign(LARGE, {"large": 4}, 2, replicate=True, piece_bytes=64 * 1024)
    told: list[Any] = []

    def log(kind: str, **fields: Any) -> None:
        told.append((kind, fields))

    with (
        servers(tmp_path, 2, optimizer="count", mode="async") as cluster,
        client(cluster.addresses, layout=layout, log=log) as worker,
    ):
        worker.load({"large": torch.zeros(LARGE["large"])})
        under_way = []
        for clock in range(40):
            under_way.append(worker.push({"large": torch.full(LARGE["large"], 1.0)}, clock))
            if clock == 20:
                under_way[10].result()
                cluster.kill(0)
        for pending in under_way:
            pending.result()
        value = worker.pull(["large"], 40).result()["large"]
    assert torch.equal(value, torch.full(LARGE["large"], 40.0))
    assert told[0][0] == "server_lost"
    assert "server 0 at tcp://" in told[0][1]["message"]


def test_async_counts_every_update_once_when_connections_break(tmp_path: Path) -> None:
    layout = assign(LARGE, {"large": 4}, 1, replicate=False, piece_bytes=128 * 1024)
    with servers(tmp_path, optimizer="count", mode="async") as cluster:
        relay = Relay(cluster.addresses[0])
        done = threading.Event()

        def cut() -> None:
            chance = random.Random(1)
            while not done.wait(chance.uniform(0.05, 0.2)):
                relay.cut()

        cutter = threading.Thread(target=cut)
        with client((relay.address,), layout=layout, lost_after_s=20.0) as worker:
            worker.load({"large": torch.zeros(LARGE["large"])})
            cutter.start()
            end = time.monotonic() + 2.0
            clock = 0
            under_way: list[Any] = []
            while time.monotonic() < end:
                under_way.append(worker.push({"large": torch.full(LARGE["large"], 1.0)}, clock))
                worker._connections._ask_again(0)  # everything under way, a second time
                clock += 1
                if len(under_way) > 3:
                    under_way.pop(0).result()
            done.set()
            cutter.join()
            for pending in under_way:
                pending.result()
            value = worker.pull(["large"], clock).result()["large"]
        relay.close()
    assert clock > 5
    assert torch.equal(value, torch.full(LARGE["large"], float(clock)))


def test_ssp_is_never_staler_than_its_bound(tmp_path: Path) -> None:
    """Each update adds one: what a worker reads at clock c counts at least c - s updates of every other worker."""
    workers, steps, bound = 3, 12, 2
    layout = assign({"x": (1,)}, {"x": 8}, 1, replicate=False)
    seen: list[tuple[int, float]] = []
    with servers(tmp_path, optimizer="count", mode="ssp", bound=bound, workers=list(range(workers))) as cluster:
        with client(cluster.addresses, layout=layout) as first:
            first.load({"x": torch.zeros(1, dtype=torch.float64)})

        def work(rank: int) -> None:
            chance = random.Random(rank)
            unit = torch.tensor([1000.0**rank], dtype=torch.float64)  # a digit for each worker
            with client(cluster.addresses, rank, layout) as worker:
                for clock in range(steps):
                    count = worker.pull(["x"], clock).result()["x"].item()
                    for other in range(workers):
                        seen.append((clock, count // 1000**other % 1000))
                    time.sleep(chance.uniform(0, 0.03 * rank))
                    worker.push({"x": unit}, clock).result()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(seen) == workers * workers * steps
    assert all(count >= clock - bound for clock, count in seen)
    assert any(count < clock for clock, count in seen), "the delays made nobody stale: this shows nothing"


def test_rows_of_a_sparse_table_survive_a_server(tmp_path: Path) -> None:
    from shoal.job.sparse_rows import SparseRows, TableSpec

    spec = TableSpec(rows=1000, dim=4, lr=0.1, dtype="float64")
    local = SparseRows(spec)
    with servers(tmp_path, 2, mode="bsp") as cluster, client(cluster.addresses, layout=(), replicate=True) as worker:
        worker.create_table("items", spec)
        remote = RemoteTable(worker, "items")
        for clock in range(6):
            ids = torch.arange(clock, 900, 7)
            gradients = remote.pull(ids).sin()
            remote.push(ids, gradients)
            local.apply(ids, gradients)
            if clock == 3:
                cluster.kill(1)
        remote.wait()
        ids = torch.arange(1000)
        torch.testing.assert_close(remote.pull(ids), local.read(ids), rtol=1e-12, atol=1e-12)


def test_without_a_replica_a_lost_server_is_an_error_that_names_it(tmp_path: Path) -> None:
    with servers(tmp_path) as cluster, client(cluster.addresses) as worker:
        worker.load(initial())
        cluster.kill(0)
        start = time.monotonic()
        with pytest.raises(ServerLostError, match=r"server 0 at tcp://127.* was lost.*no other server holds it"):
            worker.pull(list(SHAPES), 0).result()
        assert time.monotonic() - start < 5


def test_a_server_that_was_never_there_is_an_error_that_says_for_how_long() -> None:
    with client(("tcp://127.0.0.1:9",), connect_timeout_s=0.3) as worker:
        with pytest.raises(ServerLostError, match=r"server 0 at tcp://127.0.0.1:9 could not be reached for 0\.\d s"):
            worker.pull(list(SHAPES), 0).result()
        assert worker.status() == {}


def test_a_pull_that_waits_for_others_too_long_says_so(tmp_path: Path) -> None:
    with servers(tmp_path, workers=[0, 1]) as cluster, client(cluster.addresses) as worker:
        worker.load(initial())
        with pytest.raises(ServerLostError, match=r"did not answer the pull of .* within 0.3 s"):
            worker.pull(list(SHAPES), 1).result(timeout_s=0.3)
