"""The lab: a cluster emulated on one machine, made on entry and gone on exit.

Each node is a network namespace with a link of its own to a switch, shaped both ways, and a CPU quota if it has one.
What the shaping gives is measured before anything runs. The processes themselves are the launcher's; the lab only
says where each rank sits.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from shoal.cluster.description import Cluster, Node
from shoal.errors import LabError
from shoal.launch.lab import quota, sweep
from shoal.launch.lab.check import Measured, check
from shoal.launch.lab.claim import Claim, claim_new
from shoal.launch.lab.namespace import INTERFACE, Network
from shoal.launch.lab.rights import require_rights
from shoal.launch.lab.shaping import reshape, shape
from shoal.launch.placement import Placement, Seating

_PORT = 29400
"""Where rank 0 listens. Its namespace is new, so nobody else can have it."""


class Lab:
    """An emulated cluster, as a context manager.

    Entering takes about a second: it sweeps what dead labs left, builds, and measures. Leaving kills every process in
    the lab and removes all of it, also after an interrupt. `kill -9` leaves it to the next lab's sweep.

    Attributes:
        cluster: what was asked.
        measured: what each node really gets, by name; set on entry.

    Raises (on entry):
        LabError: a right or tool is missing, or a link or quota is outside 0.85 to 1.10 of what was asked.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.measured: dict[str, Measured] = {}
        self._claim: Claim | None = None
        self._network: Network | None = None
        self._groups: dict[str, Path] = {}

    def __enter__(self) -> Lab:
        require_rights()
        quota.require_cores([node.cpu for node in self.cluster.nodes if node.cpu is not None])
        sweep.sweep()
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove everything; does nothing the second time."""
        with _uninterrupted():
            if self._claim is not None:
                sweep.remove(self._claim)
            self._claim = self._network = None
            atexit.unregister(self.close)

    def _build(self) -> None:
        self._claim = claim_new()
        # For an interrupt in the instant between our return and the caller's `with`.
        atexit.register(self.close)
        nodes = self.cluster.nodes
        network = self._network = Network(self._claim.prefix, tuple(node.name for node in nodes))
        network.create()
        shape(network, nodes)
        for node in nodes:
            if node.cpu is not None:
                name = network.namespace(node.name)
                self._groups[node.name] = quota.require_controller().create(name, node.cpu)
        self.measured = check(network, nodes, self._groups)

    def seating(self) -> Seating:
        """Every rank's seat, node by node, and where rank 0 listens. Needs root to be taken."""
        network = self._up()
        seats = [(node, local_rank) for node in self.cluster.nodes for local_rank in range(node.ranks)]
        placements = tuple(
            Placement(
                rank=rank,
                node=node.name,
                local_rank=local_rank,
                prefix=self._prefix(node),
                env=_environment(node, len(self.cluster.nodes)),
            )
            for rank, (node, local_rank) in enumerate(seats)
        )
        return Seating(
            placements=placements,
            address=network.address(network.nodes[0]),
            port=_PORT,
            coordinator_address=self.switch_address,
            coordinator_prefix=self.switch_prefix(),
        )

    def counters(self) -> dict[str, tuple[int, int]]:
        """Each node's (sent, received) bytes on its link so far; take the difference of two calls.

        Traffic between ranks of one node is not in it. Segments that the kernel sends as one have their headers
        counted once, so a count can be up to 4 % under the bytes of the frames.
        """
        network = self._up()
        return {name: network.counters(name) for name in network.nodes}

    @property
    def switch_address(self) -> str:
        """The switch's own IPv4 address, which every node reaches through its own link."""
        return self._up().switch_address

    def switch_prefix(self) -> tuple[str, ...]:
        """The words to put before a command so that it runs at the switch: on no node, with no quota of any."""
        return _in_namespace(self._up().switch)

    def cut(self, node: str) -> None:
        """Lose whatever a node sends or is sent, without a word to anybody, until `restore`.

        Raises:
            LabError: the kernel refused.
        """
        self._up().connect(node, False)

    def restore(self, node: str) -> None:
        """End a cut; the link has the rate it had. TCP goes on when it next tries again, later after a longer cut.

        Raises:
            LabError: the kernel refused.
        """
        self._up().connect(node, True)

    def set_rate(self, node: str, bits_per_s: float | None) -> None:
        """Give a node's link another rate, both ways; None leaves it unshaped. What waits at its ends is lost.

        Raises:
            LabError: the kernel refused.
        """
        reshape(self._up(), node, bits_per_s)

    def set_cpu(self, node: str, cpu: float) -> None:
        """Give a node another quota, in cores' worth of CPU time; it must have been declared with one.

        Raises:
            LabError: the node has no quota, or `cpu` is less than 0.001.
        """
        if node not in self._groups:
            raise LabError(f"{node} was declared without cpu=, so it has no quota to change")
        quota.require_controller().change(self._groups[node], cpu)

    def _up(self) -> Network:
        if self._network is None:
            raise RuntimeError("the lab is not up: use it inside `with Lab(cluster) as lab:`")
        return self._network

    def _prefix(self, node: Node) -> tuple[str, ...]:
        # The group first: `ip netns exec` lays a fresh /sys over the one that shows control groups.
        group = self._groups.get(node.name)
        entry = () if group is None else quota.entry(group)
        return (*entry, *_in_namespace(self._up().namespace(node.name)))


def _in_namespace(name: str) -> tuple[str, ...]:
    return ("ip", "netns", "exec", name)


def _environment(node: Node, num_nodes: int) -> dict[str, str]:
    """What the worker's libraries must be told: which interface, and how many threads a quota feeds."""
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
    environment = dict.fromkeys(names, INTERFACE)
    cores = node.cpu if node.cpu is not None else len(os.sched_getaffinity(0)) / num_nodes
    # OpenMP's waiting threads spin, and spinning uses up the quota of those that work.
    return environment | {"OMP_NUM_THREADS": str(max(1, int(cores / node.ranks)))}


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ignore Ctrl-C; only the main thread can, and only there it would strike."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
