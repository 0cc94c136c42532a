"""Sparse tables: on one server, on several, or in this process, rows learn as a plain torch table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import shoal
from server_clients import client
from server_processes import servers
from shoal.errors import JobError, ServerRefusedError
from shoal.job.row_index import DirectIndex, HashIndex
from shoal.job.sparse_rows import SparseRows, TableSpec, initial_rows
from shoal.servers import RemoteTable

ROWS, DIM, STEPS = 50, 3, 8


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    sizes = [5, 1, 0, 12, 40, 3, 1, 9]
    return [torch.randint(0, ROWS, (size,), generator=generator) for size in sizes]


def table(optimizer: Any = "adagrad", rows: int = ROWS) -> shoal.SparseTable:
    return shoal.SparseTable(rows, DIM, optimizer=optimizer, lr=0.1, std=1.0, dtype=torch.float64)


def fit(model: shoal.SparseTable) -> torch.Tensor:
    """Train on `batches`; returns all rows."""
    for ids in batches():
        out = model(ids.view(1, -1))
        assert out.shape == (1, ids.numel(), DIM)
        (out.sin() * torch.arange(1.0, DIM + 1)).sum().backward()
        model.step()
    with torch.no_grad():
        return model(torch.arange(ROWS))


def plain(make: Any, sparse: bool = False) -> torch.Tensor:
    start = initial_rows(table().spec, np.arange(ROWS))
    reference = nn.Embedding(ROWS, DIM, dtype=torch.float64, sparse=sparse, _weight=start.clone())
    optimizer = make([reference.weight])
    for ids in batches():
        optimizer.zero_grad()
        (reference(ids).sin() * torch.arange(1.0, DIM + 1)).sum().backward()
        optimizer.step()
    return reference.weight.detach()


def test_rows_in_this_process_learn_as_a_plain_torch_table() -> None:
    expected = plain(lambda p: torch.optim.Adagrad(p, lr=0.1))
    torch.testing.assert_close(fit(table()), expected, rtol=1e-12, atol=1e-12)
    expected = plain(lambda p: torch.optim.SGD(p, lr=0.1))
    torch.testing.assert_close(fit(table("sgd")), expected, rtol=1e-12, atol=1e-12)


def test_adam_moves_a_row_as_torch_would_if_it_were_alone() -> None:
    model = shoal.SparseTable(4, DIM, optimizer="adam", lr=0.1, std=1.0, dtype=torch.float64)
    alone = nn.Parameter(initial_rows(model.spec, np.array([2])))
    optimizer = torch.optim.Adam([alone], lr=0.1)
    for step in range(5):
        for rows, stepper in ((model(torch.tensor([2])), model), (alone, optimizer)):
            rows.sin().sum().backward()
            stepper.step()
        optimizer.zero_grad()
        model(torch.tensor([step % 2])).sum().backward()  # other rows learn in between
        model.step()
    torch.testing.assert_close(model(torch.tensor([2])), alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_servers", [1, 3])
def test_rows_on_servers_learn_as_in_this_process(num_servers: int, tmp_path: Path) -> None:
    with servers(tmp_path, num_servers) as cluster, client(cluster.addresses, layout=()) as worker:
        for optimizer in ("sgd", "adagrad", "adam"):
            model = table(optimizer)
            worker.create_table(optimizer, model.spec)
            model.attach(RemoteTable(worker, optimizer))
            torch.testing.assert_close(fit(model), fit(table(optimizer)), rtol=1e-12, atol=1e-12)
        state = worker.dump()
        worker.restore(state, clock=STEPS)
        again = worker.pull_rows("adam", torch.arange(ROWS), STEPS).result()
        torch.testing.assert_close(again, fit(table("adam")), rtol=1e-12, atol=1e-12)
        with pytest.raises(ServerRefusedError, match="table 'adam': got row id 50, expected 0 to 49"):
            worker.pull_rows("adam", torch.tensor([1, 50]), STEPS).result()


def test_a_server_refuses_rows_out_of_range_itself(tmp_path: Path) -> None:
    with servers(tmp_path) as cluster, client(cluster.addresses, layout=()) as worker:
        spec = table().spec
        worker.create_table("items", spec)
        worker.know_table("items", TableSpec(rows=10**6, dim=DIM, dtype="float64"))  # a client that is mistaken
        wrong = torch.tensor([ROWS])
        with pytest.raises(ServerRefusedError, match=r"refused .* got row id 50, expected 0 to 49"):
            worker.pull_rows("items", wrong, 0).result()
        with pytest.raises(ServerRefusedError, match=r"refused .* got row id 50, expected 0 to 49"):
            worker.push_rows("items", wrong, torch.zeros(1, DIM, dtype=torch.float64), 0).result()
        assert worker.pull_rows("items", torch.tensor([0]), 0).result().shape == (1, DIM)


def test_a_table_names_a_wrong_id() -> None:
    with pytest.raises(JobError, match=r"SparseTable\(50, 3\): got row id -1, expected 0 to 49"):
        table()(torch.tensor([0, -1]))


def test_several_forwards_are_summed_and_collected_once() -> None:
    model = table()
    (model(torch.tensor([4, 4, 2])).sum() + 2 * model(torch.tensor([2])).sum()).backward()
    ids, gradients = model.collect()
    assert ids.tolist() == [2, 4]
    assert gradients.tolist() == [[3.0] * DIM, [2.0] * DIM]
    assert model.collect()[0].numel() == 0


def test_state_of_a_local_table_goes_with_the_model() -> None:
    model, other = table("adam"), table("adam")
    fit(model)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(fit(other), fit(model))


def test_first_values_do_not_depend_on_order() -> None:
    spec = TableSpec(rows=10**9, dim=8, std=0.5)
    one, other = SparseRows(spec), SparseRows(spec)
    ids = torch.randint(0, 10**9, (5000,), generator=torch.Generator().manual_seed(0))
    first = one.read(ids)
    for part in ids.flip(0).split(77):
        other.read(part)
    assert torch.equal(other.read(ids), first)
    assert abs(first.std().item() - 0.5) < 0.01
    assert abs(first.mean().item()) < 0.01


@pytest.mark.parametrize("make", [lambda: DirectIndex(100_000), lambda: HashIndex(2)])
def test_an_index_gives_every_id_one_slot(make: Any) -> None:
    index, slots = make(), dict[int, int]()
    chance = np.random.default_rng(0)
    for size in (0, 1, 10, 3000, 20_000):
        ids = chance.integers(0, 100_000, size)
        new = np.unique(ids[index.find(ids) < 0])
        slots |= dict(zip(new.tolist(), index.add(new).tolist(), strict=True))
        assert index.find(ids).tolist() == [slots[i] for i in ids.tolist()]
    assert sorted(slots.values()) == list(range(index.num_rows))
