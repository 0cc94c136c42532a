"""A real coordinator on loopback, and members in processes of their own."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal.cluster.attendance import Attendance, Hello, Listener
from shoal.errors import RunEnded
from shoal.wire.control import ControlClient, ask

TOKEN = "only-for-this-test"
RULES: dict[str, Any] = {"run": "r", "expected": 3, "min_nodes": 1, "max_nodes": 4, "lease_s": 1.0}
FINGERPRINT: dict[str, Any] = {"plan": "abc", "job": "charlm"}


def hello(name: str, **changes: Any) -> Hello:
    """What a member says first."""
    who = {"run": "r", "member": name, "node": f"node-{name}", "store": f"{name}:1", "fingerprint": FINGERPRINT}
    return Hello(**who | changes)


@dataclass
class Coordinator:
    """The process; `start` may be called again after `kill`, and then listens at the same port."""

    folder: Path
    rules: dict[str, Any]
    extra: dict[str, Any] = field(default_factory=dict)
    address: str = "127.0.0.1:0"
    process: Any = None

    def start(self) -> None:
        address_file = self.folder / "coordinator.json"
        address_file.unlink(missing_ok=True)
        self.process = self.spawn()
        until = time.monotonic() + 20
        while not address_file.exists():
            assert self.process.poll() is None, self.process.communicate()[1].decode()
            assert time.monotonic() < until, "the coordinator does not start"
            time.sleep(0.005)
        self.address = json.loads(address_file.read_text())["address"]

    def spawn(self) -> Any:
        config = {
            "rules": self.rules,
            "token": TOKEN,
            "listen": self.address,
            "log": str(self.folder / "coordinator.log"),
            "address_file": str(self.folder / "coordinator.json"),
        }
        path = self.folder / "config.json"
        path.write_text(json.dumps(config | self.extra))
        return subprocess.Popen(
            [sys.executable, "-m", "shoal.cluster.coordinator", str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "SHOAL_CONTROL": "stdin"},
        )

    def kill(self) -> tuple[str, str]:
        """kill -9. Returns what it printed."""
        self.process.kill()
        out, err = self.process.communicate()
        return out.decode(), err.decode()

    def status(self) -> dict[str, Any]:
        return ask(self.address, {"ask": "status"}, token=TOKEN)

    def attend(
        self,
        name: str,
        *,
        token: str = TOKEN,
        authority: Path | None = None,
        lease_s: float | None = None,
        listener: Listener | None = None,
        **who: Any,
    ) -> Attendance:
        """A member in this process; `who`: what its hello says other than the usual."""
        return Attendance(
            functools.partial(ControlClient, self.address, token=token, authority=authority),
            hello(name, **who),
            lease_s=lease_s or self.rules["lease_s"],
            listener=listener,
        )

    def spawn_member(self, name: str) -> Any:
        """A member in a process of its own, which enters every view."""
        (self.folder / "address").write_text(self.address)
        return subprocess.Popen([sys.executable, __file__, str(self.folder), name, str(self.rules["lease_s"])])


@contextlib.contextmanager
def coordinator(folder: Path, extra: dict[str, Any] | None = None, **rules: Any) -> Iterator[Coordinator]:
    """Start one; kill it at the end. It must have printed nothing."""
    running = Coordinator(folder, RULES | rules, extra or {})
    running.start()
    try:
        yield running
    finally:
        printed = running.kill()
    assert printed == ("", "")


@contextlib.contextmanager
def members(running: Coordinator, num: int, **settings: Any) -> Iterator[list[Attendance]]:
    """`num` members with seats 0 to num - 1, in a view if that many are expected; closed at the end."""
    with contextlib.ExitStack() as stack:
        all_of_them = []
        for index in range(num):
            member = stack.enter_context(running.attend(f"m{index}", **settings))
            assert member.wait_welcome(10) == index
            all_of_them.append(member)
        yield all_of_them


def enter(*attendances: Attendance, epoch: int) -> None:
    """All receive view `epoch` and enter it."""
    for attendance in attendances:
        view = attendance.next_view(epoch - 1, 10)
        assert view is not None
        assert view.epoch == epoch, view
        attendance.entered(epoch)


def main() -> None:
    """One member (arguments: FOLDER NAME LEASE_S): enters every view until the run ends or it is killed."""
    folder, name, lease_s = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    connect = functools.partial(ControlClient, (folder / "address").read_text(), token=TOKEN)
    with Attendance(connect, hello(name), lease_s=lease_s) as attendance:
        epoch = 0
        with contextlib.suppress(RunEnded):
            while view := attendance.next_view(epoch):
                epoch = view.epoch
                attendance.entered(epoch)
                attendance.progress(epoch, 0)


if __name__ == "__main__":
    main()
