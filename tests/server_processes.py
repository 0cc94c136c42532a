"""Real parameter servers on loopback, as processes of their own.

They are forked from one process that has imported torch already, which ends with the tests: a server starts at once.
"""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
from collections.abc import Callable, Iterator
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
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["shoal.servers", "torch._dynamo"])  # optimizers import the latter


@dataclass
class Cluster:
    """Running servers. `logs[i]` is where server i writes its events."""

    processes: list[Any]
    addresses: tuple[str, ...]
    logs: list[Path] = field(default_factory=list)

    def kill(self, index: int) -> None:
        """kill -9."""
        self.processes[index].kill()
        self.processes[index].join()

    def events(self, index: int, kind: str) -> list[dict[str, Any]]:
        lines = self.logs[index].read_text().splitlines() if self.logs[index].exists() else []
        return [event for event in map(json.loads, lines) if event["kind"] == kind]


@contextlib.contextmanager
def servers(folder: Path, num: int = 1, **settings: Any) -> Iterator[Cluster]:
    """Start `num` servers (settings: optimizer, mode, bound, workers, secrets, lost_after_s), end them at the end."""
    logs = [folder / f"server-{index}.jsonl" for index in range(num)]
    pipes, processes = [], []
    for index in range(num):
        ours, theirs = _PROCESSES.Pipe()
        process = _PROCESSES.Process(target=run, args=(theirs, {"index": index, "log": logs[index], **settings}))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        addresses = tuple(pipe.recv() for pipe in pipes)
        for pipe in pipes:
            pipe.send(addresses)
        yield Cluster(processes, addresses, logs)
    finally:
        for process, pipe in zip(processes, pipes, strict=True):
            process.kill()
            process.join()
            process.close()
            pipe.close()


def run(pipe: Any, settings: dict[str, Any]) -> None:
    """One server: tell its address, learn all addresses, then work until killed."""
    from shoal.events import EventLog
    from shoal.servers import Server, ServerConfig
    from shoal.wire.secrets import load_secrets

    torch.set_num_threads(1)
    log = EventLog(settings.pop("log"), f"server-{settings['index']}")
    optimizer = OPTIMIZERS[settings.pop("optimizer", "sgd")]
    secrets = settings.pop("secrets", None)
    config = ServerConfig(
        workers=tuple(settings.pop("workers", (0,))),
        secrets=load_secrets(secrets) if secrets else None,
        lost_after_s=settings.pop("lost_after_s", 0.5),
        **settings,
    )
    server = Server(config, lambda parameters: optimizer(parameters), log=log.write)
    pipe.send(server.address)
    server.serve(pipe.recv())
