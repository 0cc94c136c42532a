"""`shoal price` tells what a plan sends, or why it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from shoal.cli.price import price


def ask(jobs: Path, *words: str) -> Result:
    return CliRunner().invoke(price, [f"{jobs}/reference.py:job", *words])


def told(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def test_json_is_the_last_line_of_stdout_and_the_table_goes_elsewhere(jobs: Path) -> None:
    result = ask(jobs, "--nodes", "3", "--steps", "7", "--json")
    found = told(result)
    assert found["steps"] == 7
    assert found["nodes"] == ["node0", "node1", "node2"]
    assert [list(traffic) for traffic in found["traffic"]] == [["2"], ["0"], ["1"]]
    for rank, traffic in enumerate(found["traffic"]):
        parts = sum(part["times"] * sent[1] for part in found["exchanges"] for sent in part["traffic"][rank].values())
        assert sum(size_bytes for _, size_bytes in traffic.values()) == parts
    assert "1 → 0" in result.stderr


def test_ranks_of_one_node_send_nothing(jobs: Path) -> None:
    result = ask(jobs, "--lab", "nodes=1,ranks=3,link=10mbit")
    assert result.exit_code == 0
    assert "Nothing goes over the network." in result.stdout


def test_a_slower_link_takes_longer(jobs: Path) -> None:
    quick, slow = (
        told(ask(jobs, "--lab", f"nodes=2,link={link}", "--latency", "0", "--json"))["seconds"]
        for link in ("100mbit", "10mbit")
    )
    assert slow == pytest.approx(10 * quick)


def test_the_plan_says_how_many_steps_and_what_is_sent(jobs: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text('[sync]\nkind = "local"\nevery = "auto"\n[stop]\nsteps = 40\n')
    refused = ask(jobs, "--plan", str(plan))
    assert "--every" in str(refused.exception)
    found = told(ask(jobs, "--plan", str(plan), "--every", "8", "--json"))
    assert found["steps"] == 40
    assert [part["times"] for part in found["exchanges"] if part["name"] == "agreement"] == [5]


def test_a_divided_replica_has_no_price_yet(jobs: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text("[layout]\nshard = 2\n")
    assert "lies over several ranks has no price yet" in str(ask(jobs, "--nodes", "2", "--plan", str(plan)).exception)


def test_nodes_and_lab_must_agree(jobs: Path) -> None:
    refused = ask(jobs, "--nodes", "3", "--lab", "nodes=2")
    assert "--nodes is 3, but --lab describes 2 nodes" in str(refused.exception)
