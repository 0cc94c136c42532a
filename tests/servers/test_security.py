"""Strangers, liars and wrong keys: a server lives on, and a worker is told in one sentence."""

from __future__ import annotations

import stat
import struct
import time
from pathlib import Path

import pytest
import torch
import zmq

from server_clients import client, initial
from server_processes import servers
from shoal.errors import SecretsError, ServerRefusedError
from shoal.wire.frame import Header, Operation, encode
from shoal.wire.secrets import create_secrets, load_secrets


def test_what_is_no_frame_is_dropped_counted_and_told(tmp_path: Path) -> None:
    head, parts = encode(Header(Operation.PUSH), [("x", torch.zeros(4))])
    lying = head[:-9] + struct.pack("<q", 2**50) + head[-1:]
    with servers(tmp_path, max_message_bytes=1 << 20) as cluster, client(cluster.addresses) as worker:
        worker.load(initial())
        stranger = zmq.Context()
        socket = stranger.socket(zmq.DEALER)
        socket.connect(cluster.addresses[0])
        for message in ([b""], [b"GET / HTTP/1.1"], [b"\x80\x04pickle", b"x" * 1000], [lying, *map(bytes, parts)]):
            socket.send_multipart(message)
        answers, _ = encode(Header(Operation.DONE), [])
        socket.send_multipart([answers])
        empty, _ = encode(Header(Operation.LOAD), [])
        socket.send_multipart([empty])
        deadline = time.monotonic() + 5
        while worker.status()[0]["dropped"] < 6 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert worker.status()[0]["dropped"] == 6
        reasons = [event["reason"] for event in cluster.events(0, "frame_dropped")]
        assert reasons[0] == "the header has 0 bytes, expected at least 60"
        assert "parts came" in reasons[3] or "bytes" in reasons[3]
        socket.send(bytes(2 << 20))  # more than the server takes: its connection ends, not the server
        for name, value in initial().items():
            assert torch.equal(worker.pull([name], 0).result()[name], value)
        socket.close(linger=0)
        stranger.term()


def test_with_the_right_keys_everything_is_as_without(tmp_path: Path) -> None:
    path = tmp_path / "secrets.toml"
    secrets = create_secrets(path)
    with (
        servers(tmp_path, 2, optimizer="count", secrets=path) as cluster,
        client(cluster.addresses, secrets=secrets, replicate=True) as worker,
    ):
        worker.load(initial())
        worker.push(initial(), 0).result()
        for name, value in initial().items():
            torch.testing.assert_close(worker.pull([name], 1).result()[name], 2 * value)


@pytest.mark.parametrize("kind", ["another server key", "another worker key", "no keys"])
def test_a_wrong_key_is_one_clear_error_soon(kind: str, tmp_path: Path) -> None:
    right, other = create_secrets(tmp_path / "right.toml"), create_secrets(tmp_path / "other.toml")
    wrong = {
        "another server key": other,
        "another worker key": type(right)(
            server_public=right.server_public,
            server_secret="",
            worker_public=other.worker_public,
            worker_secret=other.worker_secret,
        ),
        "no keys": None,
    }[kind]
    with servers(tmp_path, secrets=tmp_path / "right.toml") as cluster:
        start = time.monotonic()
        with client(cluster.addresses, secrets=wrong) as worker, pytest.raises(ServerRefusedError) as caught:
            worker.load(initial())
        assert time.monotonic() - start < 10
        assert f"server 0 at {cluster.addresses[0]} does not accept this worker" in str(caught.value)
        assert "handshakes failed in" in str(caught.value)
        with client(cluster.addresses, secrets=right) as worker:
            worker.load(initial())


def test_a_secrets_file_is_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "secrets.toml"
    secrets = create_secrets(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_secrets(path) == secrets
    assert secrets.server_secret not in repr(secrets)
    with pytest.raises(SecretsError, match=r"cannot write the secrets file .*: File exists"):
        create_secrets(path)
    path.chmod(0o644)
    with pytest.raises(SecretsError, match=r"may be read by others \(mode 0644, expected 0600\): run `chmod 600"):
        load_secrets(path)


def test_a_secrets_file_that_is_wrong_says_where(tmp_path: Path) -> None:
    path = tmp_path / "secrets.toml"
    with pytest.raises(SecretsError, match="cannot read"):
        load_secrets(path)
    path.touch(mode=0o600)
    path.write_text('server_public = "short"\nserver_secret = "x"\nworker_public = "x"\nworker_secret = "x"\n')
    with pytest.raises(SecretsError, match=r"secrets.toml:1: server_public has 5 characters, expected 40"):
        load_secrets(path)
    path.write_text('server_public = "short"\n')
    with pytest.raises(SecretsError, match="is missing"):
        load_secrets(path)
