"""The keys of a job's parameter servers: CURVE (Curve25519) key pairs in a TOML file that only its owner can read.

One pair is the servers', one the workers'. A server lets in only who holds the workers' pair, a worker talks only to
who holds the servers': so nobody else on the network can read, change or feed a training. The file is copied to every
machine by whoever starts the job; it never travels on Shoal's own connections.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

from shoal import strict_toml
from shoal.errors import SecretsError
from shoal.strict_toml import STRICT

_KEY_LENGTH = 40  # characters of Z85 for 32 bytes


@dataclass(frozen=True, kw_only=True, repr=False)
class Secrets:
    """Both key pairs, in ZeroMQ's Z85 text. Its `repr` shows no key."""

    __pydantic_config__: ClassVar = STRICT
    server_public: str
    server_secret: str
    worker_public: str
    worker_secret: str

    def __repr__(self) -> str:
        return f"Secrets(server {self.server_public[:6]}..., worker {self.worker_public[:6]}...)"


def create_secrets(path: Path) -> Secrets:
    """Make new keys and write them to `path`, which must not exist, readable by its owner only.

    Raises:
        SecretsError: the file exists or cannot be written.
    """
    import zmq

    server_public, server_secret = zmq.curve_keypair()
    worker_public, worker_secret = zmq.curve_keypair()
    secrets = Secrets(
        server_public=server_public.decode(),
        server_secret=server_secret.decode(),
        worker_public=worker_public.decode(),
        worker_secret=worker_secret.decode(),
    )
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write("# Keys of Shoal's parameter servers. Whoever has this file can read and change the training.\n")
            file.write(strict_toml.dump(secrets))
    except OSError as error:
        raise SecretsError(f"cannot write the secrets file {path}: {error.strerror or error}") from None
    return secrets


def load_secrets(path: Path) -> Secrets:
    """Read the keys of `path`.

    Raises:
        SecretsError: it cannot be read, others may read it too, or it does not hold four keys.
    """
    text = strict_toml.read(path, error=SecretsError)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise SecretsError(f"{path} may be read by others (mode {mode:04o}, expected 0600): run `chmod 600 {path}`")
    values = strict_toml.parse(text, origin=str(path), error=SecretsError)
    secrets = strict_toml.build(Secrets, values, text=text, origin=str(path), error=SecretsError)
    for field in fields(secrets):
        key = getattr(secrets, field.name)
        if len(key) != _KEY_LENGTH or not key.isascii():
            line = strict_toml.line_of(text, [field.name])
            raise SecretsError(
                f"{path}:{line}: {field.name} has {len(key)} characters, expected {_KEY_LENGTH} of Z85: make a new file"
            )
    return secrets
