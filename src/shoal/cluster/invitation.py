"""What a worker needs to attend to a run's coordinator, as a file in the run's directory while the run goes on.

The file holds the token, so only its owner can read it: who can, may join. It is written once the coordinator listens,
and gone when the run has ended; one that a killed run left behind names an address where nobody answers.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from shoal.cluster.views import checked
from shoal.errors import CoordinatorError, RunError
from shoal.run import Run, write_atomic
from shoal.strict_toml import STRICT
from shoal.wire.control import Document, ask


@dataclass(frozen=True, kw_only=True, repr=False)
class Invitation:
    """Where a run's coordinator listens. Its `repr` shows no token.

    Attributes:
        run: the id of the attempt at the run.
        address: the coordinator's `HOST:PORT`.
        token: lets members in.
        tls: whether the connection is encrypted; `authority_file` then vouches for the coordinator.
        resume: whether the run began from a checkpoint, as every worker must know that is there at its beginning.
    """

    __pydantic_config__: ClassVar = STRICT
    run: str
    address: str
    token: str
    tls: bool
    resume: bool

    def __repr__(self) -> str:
        return f"Invitation({self.run} at {self.address})"


def authority_file(run: Run) -> Path:
    """A copy of the certificate that vouches for the run's coordinator: every machine finds it here."""
    return run.coordinator / "authority.pem"


def write_invitation(run: Run, invitation: Invitation) -> None:
    """Let workers find the coordinator."""
    write_atomic(_path(run), json.dumps(dataclasses.asdict(invitation)).encode(), mode=0o600)


def withdraw_invitation(run: Run) -> None:
    """The run is over, or has not begun."""
    _path(run).unlink(missing_ok=True)


def read_invitation(run: Run) -> Invitation:
    """What the run's launcher wrote.

    Raises:
        RunError: there is no such run, nobody trains it now, or its token is another user's.
    """
    attempt = str(run.read_info().get("id"))
    try:
        document = json.loads(_path(run).read_bytes())
    except FileNotFoundError:
        document = None
    except PermissionError:
        raise RunError(f"only the user who started {run.path} may join it: {_path(run)} cannot be read") from None
    except ValueError as error:
        raise RunError(f"{_path(run)} is damaged ({error}); is it another version's?") from None
    invitation = None if document is None else checked(Invitation, document, what="an invitation to a run")
    if invitation is None or invitation.run != attempt:
        raise RunError(
            f"nobody trains {run.path} now: the run is over, or has not begun; it can be joined when `shoal train` "
            "--resume goes on with it"
        )
    return invitation


def ask_coordinator(run: Run, invitation: Invitation, document: Document, *, timeout_s: float = 5.0) -> Document:
    """Ask the run's coordinator one question.

    Raises:
        CoordinatorError: see `wire.control.ask`.
    """
    authority = authority_file(run) if invitation.tls else None
    return ask(invitation.address, document, token=invitation.token, authority=authority, timeout_s=timeout_s)


def status_of_run(run: Run, invitation: Invitation) -> Document:
    """What the coordinator of a run that goes on says of it.

    Raises:
        RunError: the run is over.
        CoordinatorError: nobody answers, or it is another run's coordinator that does.
    """
    try:
        status = ask_coordinator(run, invitation, {"ask": "status"})
    except CoordinatorError as error:
        if error.refused:
            raise CoordinatorError(
                f"{invitation.address}, where the coordinator of {run.path} listened, is another run's now: was this "
                "one killed? `shoal train` --resume goes on with it"
            ) from None
        raise CoordinatorError(
            f"{error}: was {run.path} killed (`shoal train` --resume then goes on with it), does it listen on "
            "an address that this machine reaches (`shoal train --address`), and does a firewall stand between?"
        ) from None
    if status["state"] in ("finishing", "ended", "failed"):
        reason = (status["end"] or {}).get("reason", "training has come to its end")
        raise RunError(f"{run.path} is over: {reason}")
    return status


def _path(run: Run) -> Path:
    return run.coordinator / "invitation.json"
