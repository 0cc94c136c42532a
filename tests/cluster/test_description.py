"""A cluster's description means what it says, and every mistake in it is one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.cluster.description import Cluster, Node, load_cluster, parse_lab
from shoal.errors import ClusterError


def test_a_line_describes_nodes_that_are_all_alike() -> None:
    cluster = parse_lab("nodes=4, link=100mbit, cpu=0.5, ranks=2")
    assert cluster.nodes == tuple(Node(name=f"node{i}", ranks=2, cpu=0.5, link="100mbit") for i in range(4))
    assert cluster.world_size == 8
    assert cluster.nodes[0].rate_bits_per_s == 1e8


def test_what_a_line_leaves_out_is_unlimited() -> None:
    assert parse_lab("nodes=1").nodes == (Node(name="node0", ranks=1, cpu=None, link=None),)
    assert parse_lab("nodes=1,cpu=2").nodes[0].cpu == 2.0


def test_a_node_table_overrides_the_defaults_at_the_top(tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(
        'link = "100mbit"\ncpu = 0.5\n\n[[node]]\ncount = 2\n\n[[node]]\nname = "slow"\nlink = "10mbit"\ncpu = 0.1\n'
        '\n[[node]]\nname = "fast"\ncount = 2\nranks = 3\n'
    )
    cluster = parse_lab(str(path))
    assert [(n.name, n.ranks, n.cpu, n.link) for n in cluster.nodes] == [
        ("node0", 1, 0.5, "100mbit"),
        ("node1", 1, 0.5, "100mbit"),
        ("slow", 1, 0.1, "10mbit"),
        ("fast0", 3, 0.5, "100mbit"),
        ("fast1", 3, 0.5, "100mbit"),
    ]
    assert cluster.world_size == 9


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("node=4", r"--lab: unknown key 'node' \(did you mean 'nodes'\?\)"),
        ("link=1gbit", "--lab: nodes is missing"),
        ("nodes=0", "--lab: nodes: got the integer 0, expected greater than or equal to 1"),
        ("nodes=two", "--lab: nodes: got the string 'two', expected integer"),
        ("nodes=2,cpu=-1", "--lab: cpu: got the integer -1, expected greater than 0"),
        ("nodes=2,cpu=inf", "--lab: cpu: got the number inf, expected a finite number"),
        ("nodes=2,link=100", "--lab: link: got the .* 100"),
        ("nodes=2,link=100mb", "--lab: link: got '100mb', expected a rate such as 100mbit"),
        ("nodes=2,nodes=3", "--lab: nodes is given twice"),
        ("4", "--lab: got '4', expected key=value pairs"),
        ("", "--lab: got '', expected key=value pairs"),
    ],
)
def test_a_wrong_line_is_refused_in_one_sentence(line: str, message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        parse_lab(line)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "node is missing"),
        ("node = []", "at least one node"),
        ('[[node]]\nlink = "fast"', ":2: node.0.link: got 'fast', expected a rate"),
        ("[[node]]\n[[node]]\nlinks = 1", r":3: unknown key 'links' \(did you mean 'link'\?\)"),
        ('[[node]]\nname = "a"\n[[node]]\nname = "a"', ":4: two nodes are called 'a'"),
        ('[[node]]\nname = "-a b"', ":2: node.0.name: got '-a b', expected a host name"),
        ("[[node]]\nranks = 0", ":2: node.0.ranks: got the integer 0"),
        ('cpu = "half"\n[[node]]', ":1: cpu: got the string 'half', expected number"),
        ("[[node", "not valid TOML"),
    ],
)
def test_a_wrong_file_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(text)
    with pytest.raises(ClusterError, match=message):
        load_cluster(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"cannot read .*none\.toml: No such file"):
        parse_lab(str(tmp_path / "none.toml"))


def test_a_cluster_made_in_python_is_checked_too() -> None:
    with pytest.raises(ClusterError, match="node a: cpu: got"):
        Cluster(nodes=(Node(name="a", cpu=-1.0),))
    with pytest.raises(ClusterError, match="two nodes are called 'a'"):
        Cluster(nodes=(Node(name="a"), Node(name="a")))
    with pytest.raises(ClusterError, match="at least one node"):
        Cluster(nodes=())
