"""The files (PEM) by which a control channel is encrypted and its server proves itself, checked before their use."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from shoal.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ServerTls:
    """Where the server's certificate chain and private key lie."""

    certificate: Path
    key: Path


@dataclass(frozen=True, kw_only=True)
class Tls:
    """Both ends of it. `authority`: the certificate that vouches for the server's, which may be the server's own."""

    server: ServerTls
    authority: Path

    def check(self) -> None:
        """Refuse files that no channel could be made with.

        Raises:
            UsageError: one cannot be read or is not what it should be, or the key is another certificate's.
        """
        certificate, key = self.server.certificate, self.server.key
        for path in (certificate, key, self.authority):
            try:
                path.read_bytes()
            except OSError as error:
                raise UsageError(f"cannot read {path}, which TLS needs: {error.strerror}") from None
        try:
            # A key behind a passphrase would have it asked for at the terminal.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
        except (ssl.SSLError, ValueError) as error:
            raise UsageError(
                f"{certificate} and {key} are not a certificate chain and its private key, both as PEM and without a "
                f"passphrase ({_reason(error)})"
            ) from None
        try:
            ssl.create_default_context(cafile=self.authority)
        except ssl.SSLError as error:
            raise UsageError(f"{self.authority} holds no certificate as PEM ({_reason(error)})") from None


def tls_of(certificate: str | None, key: str | None, authority: str | None) -> Tls | None:
    """What the files of these names make possible, checked; None without a certificate and a key.

    Args:
        authority: default: the certificate vouches for itself.

    Raises:
        UsageError: see `Tls.check`.
    """
    if certificate is None or key is None:
        return None
    server = ServerTls(certificate=Path(certificate).absolute(), key=Path(key).absolute())
    tls = Tls(server=server, authority=Path(authority).absolute() if authority else server.certificate)
    tls.check()
    return tls


def _reason(error: Exception) -> str:
    return (error.reason or str(error)).lower().replace("_", " ") if isinstance(error, ssl.SSLError) else str(error)
