"""What a cluster is declared to be: nodes, the CPU each may use, and the rate of each one's link.

A description comes from a line (`nodes=4,link=100mbit,cpu=0.5`) or from a file (`cluster.toml`: defaults at the top,
then a `[[node]]` table for each kind of node). Nothing is measured or started here; the lab builds what is declared.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pydantic

from shoal import strict_toml
from shoal.errors import ClusterError
from shoal.units import parse_rate_bits_per_s

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


def _hostname(name: str) -> str:
    if _NAME.fullmatch(name) is None:
        raise ValueError(f"got {name!r}, expected a host name: small letters, digits and inner hyphens, up to 63")
    return name


def _rate(link: str) -> str:
    parse_rate_bits_per_s(link)
    return link


HostName = Annotated[str, pydantic.AfterValidator(_hostname)]
Rate = Annotated[str, pydantic.AfterValidator(_rate)]
Quota = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, pydantic.Field(ge=1)]


@dataclass(frozen=True, kw_only=True)
class Node:
    """One machine of the cluster.

    Attributes:
        name: its host name, unique in the cluster.
        ranks: how many ranks run on it, at least 1.
        cpu: how many cores' worth of CPU time all its ranks together may use; None leaves it unlimited.
        link: the rate of its link in each direction, as `tc` writes it (`100mbit`); None leaves it unshaped.
    """

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = strict_toml.STRICT

    name: HostName
    ranks: Count = 1
    cpu: Quota | None = None
    link: Rate | None = None

    @property
    def rate_bits_per_s(self) -> float | None:
        """The link's rate in bits per second, or None where it is unshaped."""
        return None if self.link is None else parse_rate_bits_per_s(self.link)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """All nodes, in order of rank: the first node holds rank 0.

    Raises:
        ClusterError: there is no node, two nodes share a name, or a node's field is out of range.
    """

    nodes: tuple[Node, ...]

    def __post_init__(self) -> None:
        if not self.nodes:
            raise ClusterError("a cluster needs at least one node, got none")
        for node in self.nodes:
            strict_toml.build(Node, vars(node), text="", origin=f"node {node.name}", error=ClusterError)
        if twice := _first_repeated([node.name for node in self.nodes]):
            raise ClusterError(f"two nodes are called '{twice}'; give each its own name")

    @property
    def world_size(self) -> int:
        """The number of ranks of all nodes together."""
        return sum(node.ranks for node in self.nodes)


def _first_repeated(names: list[str]) -> str | None:
    return next((name for index, name in enumerate(names) if name in names[:index]), None)


@dataclass(frozen=True, kw_only=True)
class _Line:
    """The keys of `--lab`."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = strict_toml.STRICT

    nodes: Count
    link: Rate | None = None
    cpu: Quota | None = None
    ranks: Count = 1


@dataclass(frozen=True, kw_only=True)
class _NodeTable:
    """One `[[node]]` table: `count` nodes alike; what it leaves out comes from the top of the file."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = strict_toml.STRICT

    name: HostName | None = None
    count: Count = 1
    link: Rate | None = None
    cpu: Quota | None = None
    ranks: Count | None = None


@dataclass(frozen=True, kw_only=True)
class _File:
    """The whole of `cluster.toml`."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = strict_toml.STRICT

    link: Rate | None = None
    cpu: Quota | None = None
    ranks: Count = 1
    node: list[_NodeTable]


def parse_lab(text: str) -> Cluster:
    """Read the value of `--lab`: `nodes=4,link=100mbit,cpu=0.5,ranks=2`, or a path that ends in `.toml`.

    Raises:
        ClusterError: a key is unknown, a value is out of range, or the file is missing or wrong.
    """
    if text.strip().endswith(".toml"):
        return load_cluster(Path(text.strip()))
    line = strict_toml.build(_Line, _pairs(text), text="", origin="--lab", error=ClusterError)
    names = [f"node{index}" for index in range(line.nodes)]
    return Cluster(nodes=tuple(Node(name=n, ranks=line.ranks, cpu=line.cpu, link=line.link) for n in names))


def _pairs(text: str) -> dict[str, Any]:
    """`nodes=4,cpu=0.5` -> `{"nodes": 4, "cpu": 0.5}`; what is no number stays text."""
    values: dict[str, Any] = {}
    for part in text.split(","):
        key, sign, value = (piece.strip() for piece in part.partition("="))
        if not (key and sign and value):
            raise ClusterError(
                f"--lab: got {part.strip()!r}, expected key=value pairs such as nodes=4,link=100mbit,cpu=0.5, "
                "or the path of a .toml file"
            )
        if key in values:
            raise ClusterError(f"--lab: {key} is given twice")
        values[key] = _number_or_text(value)
    return values


def _number_or_text(value: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def load_cluster(path: Path) -> Cluster:
    """Read `cluster.toml`.

    Raises:
        ClusterError: the file cannot be read, is not TOML, or says something a cluster cannot be; the message names
            the line.
    """
    text = strict_toml.read(path, error=ClusterError)
    values = strict_toml.parse(text, origin=str(path), error=ClusterError)
    file = strict_toml.build(_File, values, text=text, origin=str(path), error=ClusterError)
    nodes: list[Node] = []
    for index, table in enumerate(file.node):
        alike = _nodes_of(table, file, first=len(nodes))
        if twice := _first_repeated([node.name for node in nodes + alike]):
            line = strict_toml.line_of(text, ["node", str(index), "name"])
            raise ClusterError(f"{path}:{line}: two nodes are called '{twice}'; give each its own name")
        nodes += alike
    return Cluster(nodes=tuple(nodes))


def _nodes_of(table: _NodeTable, file: _File, *, first: int) -> list[Node]:
    """The nodes of one table; unnamed ones are numbered by their place in the whole cluster, from `first`."""
    if table.name is None:
        names = [f"node{first + index}" for index in range(table.count)]
    elif table.count == 1:
        names = [table.name]
    else:
        names = [f"{table.name}{index}" for index in range(table.count)]
    return [
        Node(
            name=name,
            ranks=file.ranks if table.ranks is None else table.ranks,
            cpu=file.cpu if table.cpu is None else table.cpu,
            link=file.link if table.link is None else table.link,
        )
        for name in names
    ]
