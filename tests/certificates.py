"""Self-signed certificates for tests, made with the openssl command."""

from __future__ import annotations

import subprocess
from pathlib import Path


def make_certificate(certificate: Path, key: Path, *, address: str, passphrase: str | None = None) -> None:
    """Write a certificate for an IP address, good for two days, and its private key (both PEM)."""
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    command += ["-nodes"] if passphrase is None else ["-passout", f"pass:{passphrase}"]
    command += ["-keyout", str(key), "-out", str(certificate), "-days", "2"]
    command += ["-subj", "/CN=coordinator", "-addext", f"subjectAltName=IP:{address}"]
    subprocess.run(command, check=True, capture_output=True)
