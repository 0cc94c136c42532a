"""The process of an elastic run's coordinator, as its launcher starts it, and starts it again where it was killed."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.cluster.invitation import (
    Invitation,
    ask_coordinator,
    authority_file,
    withdraw_invitation,
    write_invitation,
)
from shoal.cluster.membership_events import Rules
from shoal.errors import CoordinatorError
from shoal.launch.placement import Seating
from shoal.launch.processes import collect, open_process
from shoal.run import Run, write_atomic
from shoal.wire.tls import Tls

_READY_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How a coordinator is to serve. `resume`: the run begins from a checkpoint. `tls`: None for plain connections."""

    rules: Rules
    resume: bool
    tls: Tls | None = None


class CoordinatorProcess:
    """One run's; it listens at the same address however often it is started.

    Attributes:
        process: the latest; None before the first start.
        invitation: what a worker needs to attend; there once it has been started.
    """

    def __init__(self, run: Run, seating: Seating, serving: Serving) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.invitation: Invitation | None = None
        self._run = run
        self._seating = seating
        self._serving = serving
        self._token = secrets.token_hex(16)

    def start(self) -> str:
        """Start it, or start it again where it listened before, and let workers find it. Returns its address.

        Raises:
            CoordinatorError: it ended at its start, did not listen in time, or cannot be talked to.
        """
        if self.process is not None:
            collect(self.process)
        self._run.coordinator.mkdir(mode=0o700, exist_ok=True)
        if self.invitation is None:
            withdraw_invitation(self._run)  # an earlier attempt's
        address_file = self._run.coordinator / "address.json"
        address_file.unlink(missing_ok=True)
        config = self._run.coordinator / "config.json"
        write_atomic(config, json.dumps(self._config(address_file)).encode(), mode=0o600)
        command = [*self._seating.coordinator_prefix, sys.executable, "-m", "shoal.cluster.coordinator", str(config)]
        env = {**os.environ, "SHOAL_CONTROL": "stdin"}
        self.process = open_process(command, env, self._run.logs / "coordinator.log")
        self._invite(self._wait_for(address_file, self.process))
        assert self.invitation is not None
        return self.invitation.address

    def is_gone(self) -> bool:
        """Whether it was started, and has ended."""
        return self.process is not None and self.process.poll() is not None

    def ask(self, question: str, *, timeout_s: float) -> dict[str, Any]:
        """Ask it one question that has no fields.

        Raises:
            CoordinatorError: it does not answer.
        """
        assert self.invitation is not None, "start it first"
        return ask_coordinator(self._run, self.invitation, {"ask": question}, timeout_s=timeout_s)

    def close(self) -> None:
        """End it: nobody can join any more."""
        withdraw_invitation(self._run)
        if self.process is not None:
            collect(self.process)

    def _config(self, address_file: Path) -> dict[str, Any]:
        rules, tls, known = self._serving.rules, self._serving.tls, self.invitation
        config: dict[str, Any] = {
            "rules": {name: getattr(rules, name) for name in ("run", "expected", "min_nodes", "max_nodes", "lease_s")},
            "token": self._token,
            "listen": known.address if known else f"{self._seating.coordinator_address}:0",
            "log": str(self._run.coordinator / f"views-{rules.run}.jsonl"),
            "address_file": str(address_file),
        }
        if tls is not None:
            config |= {"certificate": str(tls.server.certificate), "key": str(tls.server.key)}
        return config

    def _invite(self, address: str) -> None:
        """The first time: tell where it listens."""
        if self.invitation is not None:
            return
        rules, tls = self._serving.rules, self._serving.tls
        self.invitation = Invitation(
            run=rules.run, address=address, token=self._token, tls=tls is not None, resume=self._serving.resume
        )
        if tls is not None:
            write_atomic(authority_file(self._run), tls.authority.read_bytes())
            self._require_trust(tls)
        write_invitation(self._run, self.invitation)

    def _require_trust(self, tls: Tls) -> None:
        """Workers would try for ever where the certificate does not fit."""
        try:
            self.ask("status", timeout_s=_READY_S)
        except CoordinatorError as error:
            host = self._seating.coordinator_address
            raise CoordinatorError(
                f"{error}; does {tls.authority} vouch for {tls.server.certificate}, and is that made out to this "
                f"address (subjectAltName = IP:{host})?"
            ) from None

    def _wait_for(self, path: Path, process: subprocess.Popen[bytes]) -> str:
        deadline = time.monotonic() + _READY_S
        while time.monotonic() < deadline:
            if path.exists():
                return str(json.loads(path.read_bytes())["address"])
            if process.poll() is not None:
                said = (self._run.logs / "coordinator.log").read_text(errors="replace").strip().splitlines()
                raise CoordinatorError(f"the coordinator ended at its start: {said[-1] if said else 'it said nothing'}")
            time.sleep(0.005)
        raise CoordinatorError(f"the coordinator did not listen within {_READY_S:.0f} s; see {self._run.logs}")
