"""Files that no encrypted channel could be made with are named before anything starts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from certificates import make_certificate
from shoal.errors import UsageError
from shoal.wire.tls import Tls, tls_of

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="certificates are made with openssl")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one` and `other` with their keys, and a key behind a passphrase."""
    folder = tmp_path_factory.mktemp("certificates")
    for name in ("one", "other"):
        make_certificate(folder / f"{name}.pem", folder / f"{name}.key", address="127.0.0.1")
    make_certificate(folder / "locked.pem", folder / "locked.key", address="127.0.0.1", passphrase="open sesame")
    (folder / "empty").write_text("")
    return folder


def tls(folder: Path, certificate: str, key: str, authority: str | None) -> Tls | None:
    return tls_of(str(folder / certificate), str(folder / key), None if authority is None else str(folder / authority))


def test_a_certificate_with_its_key_will_do_and_vouches_for_itself(files: Path) -> None:
    alone, vouched = tls(files, "one.pem", "one.key", None), tls(files, "one.pem", "one.key", "other.pem")
    assert alone is not None
    assert vouched is not None
    assert (alone.server, alone.authority) == (vouched.server, files / "one.pem")
    assert vouched.authority == files / "other.pem", "whether that vouches for it shows when it is used"
    assert tls_of(None, None, None) is None


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("gone.pem", "one.key", "one.pem"), "cannot read .*gone.pem, which TLS needs: No such file"),
        (("one.pem", "gone.key", "one.pem"), "cannot read .*gone.key"),
        (("one.pem", "one.key", "gone.pem"), "cannot read .*gone.pem"),
        (("one.pem", "other.key", "one.pem"), "not a certificate chain and its private key.*mismatch"),
        (("one.key", "one.key", "one.pem"), "not a certificate chain and its private key"),
        (("locked.pem", "locked.key", "locked.pem"), "without a passphrase"),
        (("one.pem", "one.key", "empty"), "empty holds no certificate"),
        (("one.pem", "one.key", "one.key"), "one.key holds no certificate"),
    ],
)
def test_what_is_wrong_with_the_files_is_told(files: Path, given: tuple[str, str, str], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        tls(files, *given)
