"""The lab's links can be cut, joined again and given other rates while it is up, and its nodes other quotas."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from shoal.cluster.description import Node, parse_lab
from shoal.cluster.faults import Fault
from shoal.errors import LabError
from shoal.events import EventLog, read_events
from shoal.launch.injector import Injector
from shoal.launch.lab import check, lab, rights
from shoal.launch.lab.lab import Lab
from shoal.launch.lab.namespace import Network, inside
from shoal.run import Run

_MISSING = [needed.what for needed in rights.availability() if not needed.ok]
pytestmark = pytest.mark.skipif(bool(_MISSING), reason=f"the lab needs {', '.join(_MISSING)}")


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a lab gives at first is another test's business."""
    monkeypatch.setattr(lab, "check", lambda network, nodes, groups: {})


def network_of(it: Lab) -> Network:
    assert it._network is not None
    return it._network


def check_link(it: Lab, node: Node) -> check.Measured:
    """Measure a link both ways; raises LabError where it is not what `node` says."""
    return check.check(network_of(it), [node], it._groups)[node.name]


class Conversation:
    """A TCP connection from one node to another."""

    def __init__(self, network: Network, source: str, sink: str) -> None:
        with inside(network.namespace(sink), socket.socket) as listener:
            listener.bind((network.address(sink), 0))
            listener.listen(1)
            self.sender = inside(network.namespace(source), socket.socket)
            self.sender.settimeout(5.0)
            self.sender.connect(listener.getsockname())
            self.receiver, _ = listener.accept()

    def hears(self, timeout_s: float) -> bool:
        """Whether anything comes within the time; raises ConnectionError if the connection is broken."""
        self.receiver.settimeout(timeout_s)
        try:
            return self.receiver.recv(1) != b""
        except TimeoutError:
            return False

    def receive(self, num_bytes: int) -> float:
        """Receive so many bytes or a few more; return how many seconds it took."""
        begin, received = time.monotonic(), 0
        while received < num_bytes:
            piece = self.receiver.recv(100_000)
            assert piece
            received += len(piece)
        return time.monotonic() - begin

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()


@pytest.fixture
def three_nodes() -> Iterator[Lab]:
    with Lab(parse_lab("nodes=3,link=50mbit")) as it:
        yield it


def test_a_cut_loses_everything_without_a_word_and_ends(three_nodes: Lab) -> None:
    network = network_of(three_nodes)
    talks = [Conversation(network, *ends) for ends in (("node0", "node1"), ("node1", "node0"), ("node0", "node2"))]
    try:
        three_nodes.cut("node1")
        for talk in talks:
            talk.sender.send(b"x")
        assert talks[2].hears(5.0)
        assert [talk.hears(0.3) for talk in talks[:2]] == [False, False]  # and neither end has been reset
        three_nodes.restore("node1")
        assert [talk.hears(5.0) for talk in talks[:2]] == [True, True]
    finally:
        for talk in talks:
            talk.close()
    check_link(three_nodes, three_nodes.cluster.nodes[1])


def test_a_link_gets_another_rate_and_its_own_again(three_nodes: Lab) -> None:
    node = three_nodes.cluster.nodes[1]
    three_nodes.set_rate("node1", 5e6)
    measured = check_link(three_nodes, replace(node, link="5mbit"))
    assert measured.up_bits_per_s == pytest.approx(5e6, rel=0.15)
    three_nodes.set_rate("node1", None)
    three_nodes.set_rate("node1", 50e6)
    check_link(three_nodes, node)
    check_link(three_nodes, three_nodes.cluster.nodes[0])


def test_a_rate_may_change_under_traffic(three_nodes: Lab) -> None:
    """From a fast link to a slow one: the long segments that wait in its queue must not block it."""
    three_nodes.set_rate("node0", None)
    three_nodes.set_rate("node1", 600e6)
    talk = Conversation(network_of(three_nodes), "node0", "node1")
    talk.receiver.settimeout(5.0)
    pump = threading.Thread(target=_send_until_closed, args=(talk.sender,))
    pump.start()
    try:
        talk.receive(20_000_000)
        three_nodes.set_rate("node1", 10e6)
        while talk.receive(250_000) < 0.15:  # what had come before
            pass
        talk.receive(250_000)
    finally:
        talk.sender.shutdown(socket.SHUT_RDWR)
        pump.join()
        talk.close()


def _send_until_closed(sender: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            sender.sendall(bytes(1_000_000))


def test_a_node_gets_another_quota_while_it_works() -> None:
    with Lab(parse_lab("nodes=2,cpu=0.4")) as it:
        it.set_cpu("node1", 0.1)
        nodes = (it.cluster.nodes[0], replace(it.cluster.nodes[1], cpu=0.1))
        measured = check.check(network_of(it), nodes, it._groups)
        assert measured["node1"].cpu == pytest.approx(0.1, rel=0.15)
        it.set_cpu("node1", 0.4)
        check.check(network_of(it), it.cluster.nodes, it._groups)
        with pytest.raises(LabError, match=r"cpu=0\.0001 is too little"):
            it.set_cpu("node1", 0.0001)


def test_a_node_without_a_quota_has_none_to_change(three_nodes: Lab) -> None:
    with pytest.raises(LabError, match="node1 was declared without cpu="):
        three_nodes.set_cpu("node1", 0.1)


def test_a_process_at_the_switch_is_reached_by_every_node_and_by_itself(three_nodes: Lab) -> None:
    program = (
        "import socket, sys\n"
        "with socket.create_server((sys.argv[1], 29500)) as server:\n"
        "    print('up', flush=True)\n"
        "    for _ in range(3):\n"
        "        server.accept()[0].close()\n"
    )
    command = [*three_nodes.switch_prefix(), sys.executable, "-c", program, three_nodes.switch_address]
    network = network_of(three_nodes)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "up\n"
        for namespace in (network.namespace("node0"), network.namespace("node2"), network.switch):
            with inside(namespace, socket.socket) as client:
                client.settimeout(5.0)
                client.connect((three_nodes.switch_address, 29500))
        assert server.wait(timeout=10) == 0


class FakeHands:
    """A launcher's stand-in with one seat on each node of a lab."""

    def __init__(self, folder: Path, it: Lab) -> None:
        self.run = Run(folder)
        self.lab: Lab | None = it

    def seats(self) -> list[int]:
        assert self.lab is not None
        return list(range(len(self.lab.cluster.nodes)))

    def node_of(self, seat: int) -> str:
        return f"node{seat}"

    def pid_of(self, seat: int) -> int | None:
        return None

    def coordinator_pid(self) -> int | None:
        return None

    def kill(self, seat: int) -> None: ...

    def preempt(self, seat: int) -> None: ...

    def tell(self, seat: int, line: str) -> None: ...

    def start_worker(self) -> None: ...


def test_the_injector_cuts_and_slows_real_links(three_nodes: Lab, tmp_path: Path) -> None:
    faults = [
        Fault(kind="slow_link", rank=1, step=1, factor=10.0),
        Fault(kind="cut", node="node2", step=1, seconds=1.0),
    ]
    with EventLog(tmp_path / "launcher.jsonl", "launcher") as log:
        injector = Injector(faults, FakeHands(tmp_path, three_nodes), log)
        talk = Conversation(network_of(three_nodes), "node0", "node2")
        injector.observe([{"source": f"rank-{rank}", "kind": "step", "step": 1} for rank in range(3)])
        check_link(three_nodes, replace(three_nodes.cluster.nodes[1], link="5mbit"))
        talk.sender.send(b"x")
        assert not talk.hears(0.1)
        injector.tick(time.monotonic() + 2)
        assert talk.hears(5.0)
        talk.close()
        injector.close()
    for node in three_nodes.cluster.nodes:
        check_link(three_nodes, node)
    details = [event["detail"] for event in read_events(tmp_path)]
    assert details == [
        "the link of node1 has 5 Mbit/s instead of 50 Mbit/s",
        "whatever node2 sends or is sent is lost",
        "its time was over",
        "the run is over",
    ]
