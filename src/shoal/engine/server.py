"""The process of one parameter server: `python -m shoal.engine.server RUN INDEX`, started by the launcher.

It reads the job and the plan from the run directory, listens on its node's network, tells the workers where, and serves
until rank 0 ends it or its launcher goes away. Workers that stay from beginning to end are told through their store;
where they come and go, through a file in the run's directory, and who they are is told to the servers in each view.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from shoal.cluster.whereabouts import Whereabouts
from shoal.engine import control
from shoal.engine.start import target_of_run
from shoal.errors import RendezvousError, ShoalError, user_traceback
from shoal.events import EventLog
from shoal.job.job import Job
from shoal.plan import Plan, load_plan
from shoal.run import Run
from shoal.servers import Server, ServerConfig
from shoal.strategy.codec import make_codec
from shoal.strategy.sync.parameter_server import ParameterServerConfig
from shoal.wire.addresses import own_address
from shoal.wire.rendezvous import JOIN_TIMEOUT_S
from shoal.wire.secrets import load_secrets


def main() -> None:
    """Run one server and end the process."""
    run, index = Run(Path(sys.argv[1])), int(sys.argv[2])
    with EventLog(run.events / f"server-{index}.jsonl", f"server-{index}") as log:
        try:
            control.listen(os.environ)
            _serve(run, index, log)
            code = 0
        except BaseException as error:
            print("".join(traceback.format_exception(error)), file=sys.stderr, flush=True)
            trace = "" if isinstance(error, ShoalError) else user_traceback(error)
            log.write("error", error=type(error).__name__, message=str(error), traceback=trace, symptom=False)
            code = 1
    os._exit(code)


def _serve(run: Run, index: int, log: EventLog) -> None:
    plan = load_plan(run.plan)
    sync = plan.sync
    assert isinstance(sync, ParameterServerConfig)
    job = target_of_run(run).load()
    comes_and_goes = plan.elastic.min_nodes > 0
    workers = _Number(1 if comes_and_goes else int(os.environ["WORLD_SIZE"]))
    config = ServerConfig(
        index=index,
        workers=() if comes_and_goes else tuple(range(workers.value)),
        mode=sync.mode,
        bound=sync.staleness,
        address=f"tcp://{own_address(os.environ)}:*",
        secrets=load_secrets(Path(sync.secrets)) if sync.secrets else None,
    )
    codec = make_codec(plan.codec) if plan.codec.kind != "none" else None
    server = Server(
        config,
        job.optimizer,
        schedule=_schedule(job, plan, workers),
        codec=codec,
        log=log.write,
        on_members=workers.become,
    )
    log.write("server_started", address=server.address, mode=sync.mode)
    meet = _meet_in_files if comes_and_goes else _meet_in_store
    server.serve(meet(run, index, server.address, sync.servers))


def _meet_in_files(run: Run, index: int, address: str, num_servers: int) -> Sequence[str]:
    whereabouts = Whereabouts(run)
    whereabouts.publish(index, address)
    return whereabouts.find(num_servers, JOIN_TIMEOUT_S).addresses


def _meet_in_store(_: Run, index: int, address: str, num_servers: int) -> Sequence[str]:
    store = _store()
    store.set(f"server/{index}", address)
    keys = [f"server/{other}" for other in range(num_servers)]
    store.wait(keys, timedelta(seconds=JOIN_TIMEOUT_S))
    return [store.get(key).decode() for key in keys]


@dataclass
class _Number:
    """Of workers."""

    value: int

    def become(self, value: int) -> None:
        """They have changed."""
        self.value = value


def _schedule(job: Job, plan: Plan, workers: _Number) -> Any:
    """The job's schedule, which counts steps of all workers: where each push is an update, one in so many workers."""
    if job.schedule is None:
        return None
    make = job.schedule
    assert isinstance(plan.sync, ParameterServerConfig)
    if plan.sync.mode == "bsp":
        return make
    return lambda optimizer: _EveryNth(optimizer, make(optimizer), workers)


class _EveryNth:
    """A schedule that moves on with every n-th step only."""

    def __init__(self, optimizer: Optimizer, schedule: LRScheduler, every: _Number) -> None:
        self._schedule = schedule
        self._every = every
        self._count = 0

    def step(self) -> None:
        """One update."""
        self._count += 1
        if self._count >= self._every.value:
            self._count = 0
            self._schedule.step()

    def state_dict(self) -> dict[str, Any]:
        """All that must survive a restart."""
        return {**self._schedule.state_dict(), "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`'s value."""
        self._count = state["count"]
        self._schedule.load_state_dict({name: item for name, item in state.items() if name != "count"})


def _store() -> dist.TCPStore:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        timeout = timedelta(seconds=JOIN_TIMEOUT_S)
        return dist.TCPStore(host, port, None, False, timeout=timeout, wait_for_workers=False)
    except RuntimeError:
        raise RendezvousError(
            f"a parameter server could not reach rank 0 at {host}:{port} within {JOIN_TIMEOUT_S:.0f} s; is it running?"
        ) from None


if __name__ == "__main__":
    main()
