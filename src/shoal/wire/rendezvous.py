"""How ranks find each other: the standard environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), a key-value store
at rank 0, and a check that all came for the same thing.

Beside torchrun's variables: SHOAL_NODE names the node (default: the host's name), SHOAL_LISTEN_FD hands rank 0 a socket
that listens already, so that no port can be taken between choosing it and using it.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from shoal.errors import PlanMismatchError, RendezvousError
from shoal.wire.groups import SILENCE_TIMEOUT_S, World

JOIN_TIMEOUT_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Who this process is."""

    rank: int
    world_size: int
    node: str
    address: str
    port: int
    listen_fd: int | None = None


@dataclass(frozen=True)
class Membership:
    """All ranks, joined. `nodes[r]` is the name of rank r's node; `store` is shared by all."""

    identity: Identity
    nodes: tuple[str, ...]
    store: dist.Store


def identity_from(env: Mapping[str, str]) -> Identity:
    """Read the identity from environment variables.

    Raises:
        RendezvousError: one is missing or is not a number.
    """
    try:
        listen_fd = env.get("SHOAL_LISTEN_FD")
        return Identity(
            rank=int(env["RANK"]),
            world_size=int(env["WORLD_SIZE"]),
            node=env.get("SHOAL_NODE", socket.gethostname()),
            address=env["MASTER_ADDR"],
            port=int(env["MASTER_PORT"]),
            listen_fd=int(listen_fd) if listen_fd else None,
        )
    except KeyError as missing:
        raise RendezvousError(
            f"environment variable {missing.args[0]} is not set; start workers with `shoal train` or with torchrun"
        ) from None
    except ValueError as error:
        raise RendezvousError(f"RANK, WORLD_SIZE and MASTER_PORT must be whole numbers: {error}") from None


def join(identity: Identity, fingerprint: Mapping[str, str], *, timeout_s: float = JOIN_TIMEOUT_S) -> Membership:
    """Meet all other ranks and agree that everybody runs the same thing.

    Args:
        fingerprint: what must be equal on every rank (plan hash, job, versions), by name.
        timeout_s: how long to wait for the others.

    Raises:
        RendezvousError: rank 0 cannot be reached, its port is taken, or a rank does not come.
        PlanMismatchError: this rank's fingerprint is not rank 0's (or, at rank 0, another's is not).
    """
    store = _open_store(identity, timeout_s)
    own = {"node": identity.node, "fingerprint": dict(fingerprint)}
    store.set(f"member/{identity.rank}", json.dumps(own))
    members = [_member(store, rank, identity, timeout_s) for rank in range(identity.world_size)]
    for rank, member in enumerate(members):
        _check_same(members[0]["fingerprint"], member["fingerprint"], rank, me=identity.rank)
    return Membership(identity, tuple(str(member["node"]) for member in members), store)


def connect(membership: Membership, device: torch.device) -> World:
    """Connect all ranks. Collective.

    Raises:
        PeerLostError: a rank could not be reached.
    """
    identity = membership.identity
    world = World(membership.store, identity.rank, identity.world_size, device)
    world.connect()
    return world


def start_default_group(membership: Membership, device: torch.device) -> None:
    """Start torch.distributed's default group, on which its layouts stand: Gloo, and NCCL where ranks hold GPUs."""
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("default", membership.store),
        rank=membership.identity.rank,
        world_size=membership.identity.world_size,
        timeout=timedelta(seconds=SILENCE_TIMEOUT_S),
    )


def leave(membership: Membership, world: World) -> None:
    """End in step: rank 0 holds the store and goes last."""
    world.sum([0.0])
    if dist.is_initialized():
        dist.destroy_process_group()
    rank, world_size = membership.identity.rank, membership.identity.world_size
    membership.store.set(f"left/{rank}", "")
    if rank == 0:
        membership.store.wait([f"left/{other}" for other in range(world_size)], timedelta(seconds=30))


def _open_store(identity: Identity, timeout_s: float) -> dist.TCPStore:
    where = f"{identity.address}:{identity.port}"
    try:
        return dist.TCPStore(
            identity.address,
            identity.port,
            identity.world_size,
            identity.rank == 0,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=identity.listen_fd if identity.rank == 0 else None,
        )
    except RuntimeError as error:
        if identity.rank == 0:
            raise RendezvousError(
                f"rank 0 cannot listen at {where}, most likely the port is taken: name another with --port "
                f"({str(error).splitlines()[0]})"
            ) from None
        raise RendezvousError(
            f"rank {identity.rank} could not reach rank 0 at {where} within {timeout_s:.0f} s; is it running, and "
            "does a firewall stand between?"
        ) from None


def _member(store: dist.Store, rank: int, identity: Identity, timeout_s: float) -> dict[str, object]:
    try:
        store.wait([f"member/{rank}"], timedelta(seconds=timeout_s))
        member = json.loads(store.get(f"member/{rank}"))
    except RuntimeError:
        raise RendezvousError(
            f"rank {identity.rank} waited {timeout_s:.0f} s for rank {rank} of {identity.world_size}, which never came"
        ) from None
    assert isinstance(member, dict)
    return member


def _check_same(expected: object, got: object, rank: int, *, me: int) -> None:
    if expected == got or me not in (0, rank):
        return
    assert isinstance(expected, dict)
    assert isinstance(got, dict)
    name = next(key for key in expected | got if expected.get(key) != got.get(key))
    raise PlanMismatchError(
        f"rank {rank} may not join: its {name} is {got.get(name)}, rank 0's is {expected.get(name)}; start all ranks "
        "with the same plan, job and versions"
    )
