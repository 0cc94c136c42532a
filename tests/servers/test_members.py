"""Servers whose workers change: nothing of an earlier view counts, nothing is missing, nothing counts twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from server_clients import SHAPES, client, initial
from server_processes import servers
from shoal.errors import PeerLostError
from shoal.servers.ledger import Ledger


def test_a_step_that_a_loss_cut_in_two_is_made_whole_in_the_lost_ones_name(tmp_path: Path) -> None:
    """Worker 1 brought one key of two steps' worth, and died."""
    ones = {name: torch.ones(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    with servers(tmp_path, 2, optimizer="count", workers=[], mode="bsp") as cluster:
        with client(cluster.addresses, 0, epoch=1) as zero, client(cluster.addresses, 1, epoch=1) as one:
            zero.load(initial())
            assert zero.is_loaded()
            zero.change_members([0, 1], 0)
            zero.push(ones, 0).result()
            one.push({"bias": ones["bias"]}, 0).result()
            assert zero.clocks() == {0: 0, 1: 0}
        with client(cluster.addresses, 1, epoch=2, in_name=True) as in_name:
            in_name.push(ones, 0).result()
            assert in_name.clocks() == {0: 1, 1: 1}
        with client(cluster.addresses, 0, epoch=2) as zero:
            zero.change_members([0, 3], 1)
            for name, value in zero.pull(list(SHAPES), 1).result().items():
                torch.testing.assert_close(value, initial()[name] + 2)


def test_what_comes_of_an_earlier_view_is_turned_away_by_name(tmp_path: Path) -> None:
    with (
        servers(tmp_path, optimizer="count", workers=[], mode="async") as cluster,
        client(cluster.addresses, 0, epoch=3) as now,
        client(cluster.addresses, 1, epoch=2) as late,
    ):
        now.load(initial())
        now.change_members([0], 0)
        with pytest.raises(PeerLostError, match="view that has ended"):
            late.push(initial(), 0).result()
        with pytest.raises(PeerLostError):
            late.change_members([1], 0)
        for name, value in now.pull(list(SHAPES), 0).result().items():
            torch.testing.assert_close(value, initial()[name])


def test_after_its_steps_were_brought_in_its_name_a_workers_own_still_count(tmp_path: Path) -> None:
    with servers(tmp_path, optimizer="count", workers=[], mode="ssp") as cluster:
        with client(cluster.addresses, 0, epoch=1) as worker:
            worker.load(initial())
            worker.change_members([0], 0)
        with client(cluster.addresses, 0, epoch=2, in_name=True) as in_name:
            in_name.push(initial(), 0).result()
        with client(cluster.addresses, 0, epoch=2) as worker:
            worker.change_members([0], 1)
            worker.push(initial(), 1).result()
            assert worker.clocks() == {0: 2}


def test_servers_know_which_parts_have_arrived_whole(tmp_path: Path) -> None:
    with (
        servers(tmp_path, 2, optimizer="count", workers=[], mode="async") as cluster,
        client(cluster.addresses, 0, epoch=1) as worker,
    ):
        worker.load(initial())
        worker.change_members([0], 0)
        worker.push(initial(), 7).result()
        worker.push(initial(), 9).result()
        worker.push({"bias": initial()["bias"]}, 8).result()
        assert worker.parts_used(7) == [7, 9]
        assert worker.parts_used(8) == [9]
        assert worker.parts_used(7) == [9], "what lies before was forgotten"


def test_a_ledger_counts_keys() -> None:
    ledger = Ledger()
    for part in (1, 1, 2):
        ledger.note(part)
    assert ledger.whole(0, 2) == [1]
    assert ledger.whole(2, 1) == [2]
