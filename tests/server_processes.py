"""Real parameter servers on loopback, as processes of their own, and clients for them."""

from __future__ import annotations

import contextlib
import functools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.1),
    "momentum": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
    "count": functools.partial(torch.optim.SGD, lr=1.0, maximize=True),  # the value becomes the sum of all updates
}


@dataclass
class Cluster:
    """Running servers. `logs[i]` is where server i writes its events."""

    processes: list[subprocess.Popen[str]]
    addresses: tuple[str, ...]
    logs: list[Path] = field(default_factory=list)

    def kill(self, index: int) -> None:
        """kill -9."""
        self.processes[index].kill()
        self.processes[index].wait()

    def events(self, index: int, kind: str) -> list[dict[str, Any]]:
        lines = self.logs[index].read_text().splitlines() if self.logs[index].exists() else []
        return [event for event in map(json.loads, lines) if event["kind"] == kind]


@contextlib.contextmanager
def servers(folder: Path, num: int = 1, **settings: Any) -> Iterator[Cluster]:
    """Start `num` servers (settings: optimizer, mode, bound, workers, secrets, lost_after_s), end them at the end."""
    logs = [folder / f"server-{index}.jsonl" for index in range(num)]
    processes = [_start({"index": index, "log": str(logs[index]), **settings}) for index in range(num)]
    try:
        addresses = tuple(_stdout(process).readline().strip() for process in processes)
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(addresses) + "\n")
            process.stdin.flush()
        yield Cluster(processes, addresses, logs)
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def _start(settings: Mapping[str, Any]) -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(__file__)), json.dumps(settings)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _stdout(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    return process.stdout


def main() -> None:
    """One server: its address on standard output, all addresses on standard input, then work until killed."""
    from shoal.events import EventLog
    from shoal.servers import Server, ServerConfig
    from shoal.wire.secrets import load_secrets

    settings = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    log = EventLog(Path(settings.pop("log")), f"server-{settings['index']}")
    optimizer = OPTIMIZERS[settings.pop("optimizer", "sgd")]
    secrets = settings.pop("secrets", None)
    config = ServerConfig(
        workers=tuple(settings.pop("workers", (0,))),
        secrets=load_secrets(Path(secrets)) if secrets else None,
        lost_after_s=settings.pop("lost_after_s", 0.5),
        **settings,
    )
    server = Server(config, lambda parameters: optimizer(parameters), log=log.write)
    print(server.address, flush=True)
    server.serve(json.loads(sys.stdin.readline()))


if __name__ == "__main__":
    main()
