"""kill -9 of one worker of four under torchrun with DistributedDataParallel, and under torchft, on emulated nodes.

Both are started as their own documents say, one agent a node. Torchrun restarts all workers, which go on from the last
snapshot; torchft's survivors go on without the lost replica, and its agent starts that again.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from failures_reading import interruption, plain, returned_s
from failures_shoal import NODES, Task, with_patience
from shoal.cluster.description import parse_lab
from shoal.events import Event, EventReader, read_events
from shoal.launch.lab.lab import Lab
from shoal.launch.placement import Placement, Seating

HERE = Path(__file__).parent
RENDEZVOUS_PORT, LIGHTHOUSE_PORT, STORE_PORT = 29400, 29510, 29600
START_S = 90.0
LIGHTHOUSE = ("--min_replicas", "2", "--quorum_tick_ms", "100", "--join_timeout_ms", "10000")
"""As torchft's README starts it, with two replicas as Shoal's `min_nodes`."""


@dataclass
class Rival:
    """One way to train: what it needs beside the agents, and how an agent is started."""

    name: str
    settings: Mapping[str, Any]
    lighthouse: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_torchft(self) -> bool:
        """Else it is torchrun."""
        return bool(self.lighthouse)

    def agent(self, seating: Seating, placement: Placement) -> list[str]:
        """The command of one node's agent, without the worker's settings."""
        command = [*_on(placement), sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1"]
        if self.is_torchft:
            ports = [f"--master-addr={placement.node}", f"--master-port={STORE_PORT}"]
            return [*command, "--nnodes=1", "--max-restarts=3", *ports, str(HERE / "torchft_worker.py")]
        first = seating.placements[0].node
        rendezvous = [f"--rdzv-endpoint={first}:{RENDEZVOUS_PORT}", f"--rdzv-conf=is_host={int(placement.rank == 0)}"]
        rendezvous += ["--rdzv-backend=c10d", "--rdzv-id=benchmark", f"--local-addr={placement.node}"]
        nnodes = [f"--nnodes={len(seating.placements)}", "--max-restarts=3"]
        return [*command, *nnodes, *rendezvous, str(HERE / "torchrun_worker.py")]


def torchrun(every: int, *, own_store: bool = False) -> Rival:
    """With snapshots every so many steps.

    By default all attempts of a job share the rendezvous's store, and so the workers that are started again may find
    the addresses of those before them. `own_store`: each rendezvous gets a store of its own instead.
    """
    variable = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
    env = {variable: "1"} if own_store else {}
    return Rival("torchrun" + f" with {variable}" * own_store, {"every": every}, env=env)


def torchft(*more: str, ddp: bool) -> Rival:
    """With options for its lighthouse; with its DistributedDataParallel, or its manager's all-reduce."""
    name = " ".join(["torchft", "DDP" if ddp else "Manager.allreduce", *more])
    return Rival(name, {"min_replicas": 2, "size": NODES, "ddp": ddp}, (*LIGHTHOUSE, *more))


def why_no_torchft() -> str | None:
    """Why torchft cannot be measured here; None if it can."""
    told = subprocess.run([sys.executable, "-c", "import torchft"], capture_output=True, text=True)
    return None if told.returncode == 0 else told.stderr.strip().splitlines()[-1]


def killed(rival: Rival, task: Task, kill_at: int, struck: int, limit_s: float) -> dict[str, Any]:
    """Kill the worker of node `struck` after step `kill_at`; wait `limit_s` for the next committed step."""
    return with_patience(lambda: _killed(rival, task, kill_at, struck, limit_s))


def _killed(rival: Rival, task: Task, kill_at: int, struck: int, limit_s: float) -> dict[str, Any]:
    source = f"rank-{struck}"
    cluster = parse_lab(f"nodes={NODES},link={task.link}")
    with tempfile.TemporaryDirectory(prefix="shoal-failures-") as name, Lab(cluster) as lab:
        folder = Path(name)
        with _agents(rival, task, lab, folder) as agents:
            reader = EventReader(folder / "events")
            events = _follow(reader, [], START_S, lambda now: _reached(now, kill_at) or _all_ended(agents))
            if not _reached(events, kill_at):
                return {"came_back": False, "error": f"did not reach step {kill_at}: {_last_words(folder)}"}
            pid = [e["pid"] for e in events if e["kind"] == "run_started" and e["source"] == source][-1]
            os.kill(pid, signal.SIGKILL)
            t = time.time()
            _follow(reader, events, limit_s, lambda now: bool(interruption(now, t, source)) or _all_ended(agents))
            found = interruption(read_events(folder / "events"), t, source)
            if found is None:
                waited = f"no step within {time.time() - t:.0f} s"
                return {"came_back": False, "error": f"{waited}: {_last_words(folder)}"}
            _follow(reader, events, limit_s, lambda now: returned_s(now, t, source) is not None or _all_ended(agents))
            events = read_events(folder / "events")
            again = {e["source"] for e in events if e["kind"] == "run_started" and e["t"] > t} - {source}
            return {
                "came_back": True,
                **plain(found),
                "survivors_restarted": len(again),
                "struck_back_s": returned_s(events, t, source),
            }


@contextlib.contextmanager
def _agents(rival: Rival, task: Task, lab: Lab, folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Every node's agent, and torchft's lighthouse at the switch."""
    seating = lab.seating()
    (folder / "events").mkdir()
    settings = {"job": task.job, "set": task.arguments, "batch": task.batch, "events": str(folder / "events")}
    settings |= {"snapshot": str(folder / "snapshot.pt"), **rival.settings}
    env = {**os.environ, **rival.env, "TORCHFT_LIGHTHOUSE": f"http://{seating.coordinator_address}:{LIGHTHOUSE_PORT}"}
    commands = []
    if rival.is_torchft:
        program = str(Path(sys.executable).with_name("torchft_lighthouse"))
        bind = ["--bind", f"0.0.0.0:{LIGHTHOUSE_PORT}"]
        commands.append(([*seating.coordinator_prefix, program, *bind, *rival.lighthouse], env, "lighthouse"))
    for placement in seating.placements:
        here = {**env, **placement.env, "BENCHMARK_SEAT": str(placement.rank)}
        commands.append(([*rival.agent(seating, placement), json.dumps(settings)], here, placement.node))
    agents = []
    try:
        for command, environment, name in commands:
            with (folder / f"{name}.log").open("wb") as log:
                made = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
            agents.append(made)
        yield agents[-len(seating.placements) :]
    finally:
        for agent in agents:
            agent.kill()
            agent.wait()  # the workers end with the lab


def _on(placement: Placement) -> list[str]:
    """What goes before a command on a node, whose host name is then the node's: rivals tell others where they are."""
    named = 'hostname "$0" && exec "$@"'
    return [*placement.prefix, "unshare", "--uts", "sh", "-c", named, placement.node]


def _follow(reader: EventReader, events: list[Event], limit_s: float, is_over: Any) -> list[Event]:
    """Gather new events until something holds of them, or the time is over."""
    deadline = time.monotonic() + limit_s
    while not is_over(events) and time.monotonic() < deadline:
        time.sleep(0.02)
        events.extend(reader.poll())
    return events


def _reached(events: Sequence[Event], step: int) -> bool:
    return any(e["kind"] == "step" and e["step"] >= step for e in events)


def _all_ended(agents: Sequence[subprocess.Popen[bytes]]) -> bool:
    return all(agent.poll() is not None for agent in agents)


def _last_words(folder: Path) -> str:
    """What the logs say of errors, the last different ones."""
    words = [
        line.strip()[:300]
        for log in sorted(folder.glob("*.log"))
        for line in log.read_text(errors="replace").splitlines()
        if re.search(r"Error\b|error:|Timed? ?out|exitcode|closed", line) and "error_file" not in line
    ]
    return " | ".join(list(dict.fromkeys(words))[-6:]) or "nothing in its logs"
