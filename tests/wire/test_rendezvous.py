"""Ranks meet, agree that they run the same thing, or are told within their time why not."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from shoal.errors import PlanMismatchError, RendezvousError, WireError
from shoal.wire.rendezvous import Identity, Membership, identity_from, join

SAME = {"plan hash": "0123456789ab", "job": "charlm.py:job {}", "torch version": "2"}
STANDARD = {"RANK": "2", "WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


def listen() -> socket.socket:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(16)
    return listener


def meet(fingerprints: list[Mapping[str, str]], timeout_s: float = 20.0) -> list[Membership | WireError]:
    """Let one thread for each fingerprint join; return what each got."""
    listener = listen()
    port = listener.getsockname()[1]
    descriptor = listener.detach()  # the store closes it

    def rank(number: int) -> Membership | WireError:
        identity = Identity(
            rank=number,
            world_size=len(fingerprints),
            node=f"node{number // 2}",
            address="127.0.0.1",
            port=port,
            listen_fd=descriptor if number == 0 else None,
        )
        try:
            return join(identity, fingerprints[number], timeout_s=timeout_s)
        except WireError as error:
            return error

    with ThreadPoolExecutor(len(fingerprints)) as pool:
        return list(pool.map(rank, range(len(fingerprints))))


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_all_ranks_learn_who_is_on_which_node(world_size: int) -> None:
    for membership in meet([SAME] * world_size):
        assert isinstance(membership, Membership)
        assert membership.nodes == tuple(f"node{rank // 2}" for rank in range(world_size))


@pytest.mark.parametrize("name", SAME)
def test_a_rank_with_something_else_is_refused_by_name_on_both_sides(name: str) -> None:
    results = meet([SAME, SAME, SAME | {name: "something else"}])
    for rank in (0, 2):
        assert isinstance(results[rank], PlanMismatchError)
        assert f"rank 2 may not join: its {name} is something else, rank 0's is {SAME[name]}" in str(results[rank])
    assert isinstance(results[1], Membership)


@pytest.mark.parametrize("odd", [{}, SAME | {"a new version's": "value"}, {"plan hash": SAME["plan hash"]}])
def test_a_rank_that_names_other_things_is_refused_too(odd: Mapping[str, str]) -> None:
    assert [type(result) for result in meet([SAME, odd])] == [PlanMismatchError] * 2
    assert [type(result) for result in meet([odd, SAME])] == [PlanMismatchError] * 2


def test_the_first_difference_is_told_and_not_all() -> None:
    error = meet([SAME, dict.fromkeys(SAME, "other")])[1]
    assert "plan hash" in str(error)
    assert "torch version" not in str(error)


def timed(attempt: Callable[[], Any]) -> tuple[str, float]:
    started = time.perf_counter()
    with pytest.raises(RendezvousError) as error:
        attempt()
    return str(error.value), time.perf_counter() - started


def test_a_rank_that_never_comes_is_named_when_the_time_is_up() -> None:
    identity = Identity(rank=0, world_size=2, node="a", address="127.0.0.1", port=0)
    message, took_s = timed(lambda: join(identity, SAME, timeout_s=1.0))
    assert message == "rank 0 waited 1 s for rank 1 of 2, which never came"
    assert took_s < 5.0


def test_a_rank_zero_that_is_not_there_is_named_with_its_address(capfd: pytest.CaptureFixture[str]) -> None:
    with listen() as free:
        port = free.getsockname()[1]
    identity = Identity(rank=1, world_size=2, node="a", address="127.0.0.1", port=port)
    message, took_s = timed(lambda: join(identity, SAME, timeout_s=1.0))
    assert f"rank 1 could not reach rank 0 at 127.0.0.1:{port} within 1 s" in message
    assert took_s < 8.0
    capfd.readouterr()  # the store's own log of its attempts


def test_a_taken_port_is_named_with_what_to_do(capfd: pytest.CaptureFixture[str]) -> None:
    with listen() as other:
        port = other.getsockname()[1]
        identity = Identity(rank=0, world_size=1, node="a", address="127.0.0.1", port=port)
        message, took_s = timed(lambda: join(identity, SAME, timeout_s=20.0))
    assert f"rank 0 cannot listen at 127.0.0.1:{port}, most likely the port is taken" in message
    assert "--port" in message
    assert took_s < 5.0
    capfd.readouterr()


def test_the_standard_variables_are_enough() -> None:
    assert identity_from(STANDARD) == Identity(
        rank=2, world_size=4, node=socket.gethostname(), address="10.0.0.1", port=29500
    )


def test_the_launcher_may_name_the_node_and_hand_over_a_socket() -> None:
    identity = identity_from(STANDARD | {"SHOAL_NODE": "left", "SHOAL_LISTEN_FD": "7"})
    assert (identity.node, identity.listen_fd) == ("left", 7)
    assert identity_from(STANDARD | {"SHOAL_LISTEN_FD": ""}).listen_fd is None


@pytest.mark.parametrize("name", STANDARD)
def test_a_missing_variable_is_named_with_what_to_do(name: str) -> None:
    env = {key: value for key, value in STANDARD.items() if key != name}
    with pytest.raises(RendezvousError, match=f"environment variable {name} is not set; start workers with"):
        identity_from(env)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_PORT"])
@pytest.mark.parametrize("value", ["", "two", "1.0"])
def test_a_variable_that_is_no_number_is_refused(name: str, value: str) -> None:
    with pytest.raises(RendezvousError, match="must be whole numbers"):
        identity_from(STANDARD | {name: value})


WORKER = """
import os, sys, torch
from shoal.wire.rendezvous import connect, identity_from, join, leave, start_default_group
membership = join(identity_from(os.environ), {}, timeout_s=60.0)
world = connect(membership, torch.device("cpu"))
start_default_group(membership, torch.device("cpu"))
total = torch.ones(3)
torch.distributed.all_reduce(total)
assert total.tolist() == [2.0] * 3
leave(membership, world)
print("left", flush=True)
os._exit(0)
"""


def test_all_ranks_leave_in_step_and_nobody_complains() -> None:
    listener = listen()
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1]), "WORLD_SIZE": "2"}
    processes = []
    for rank in range(2):
        own = env | {"RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        given = {"SHOAL_LISTEN_FD": str(listener.fileno())} if rank == 0 else {}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", WORKER],
                env=own | given,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                pass_fds=[listener.fileno()] if rank == 0 else [],
            )
        )
    listener.close()
    try:
        for process in processes:
            assert process.communicate(timeout=90) == ("left\n", "")
            assert process.returncode == 0
    finally:
        for process in processes:
            process.kill()
            process.wait()
