"""What the benchmarks share: one script started on every seat, rank 0's figures collected, printed and stored."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shoal.cluster.description import parse_lab
from shoal.launch import local
from shoal.launch.lab.lab import Lab
from shoal.launch.placement import Seating

RESULTS = Path(__file__).parent / "results"


@contextlib.contextmanager
def seating_of(where: str) -> Iterator[Seating]:
    """Seats by name: `local4` is four ranks here, `lab4:100mbit` four emulated nodes with such links."""
    kind, _, link = where.partition(":")
    if kind.startswith("local"):
        yield local.seating(int(kind.removeprefix("local")), port=29511)
        return
    with Lab(parse_lab(f"nodes={kind.removeprefix('lab')},link={link}")) as lab:
        yield lab.seating()


def run_workers(
    seating: Seating,
    script: Path,
    settings: Mapping[str, Any],
    *,
    timeout_s: float = 900,
    watch: Callable[[list[int]], None] = lambda _: None,
) -> Any:
    """Run `script` on every seat with `settings` as its JSON argument; return the JSON that rank 0 printed last.

    `watch` is given the workers' process ids some 20 times a second.
    """
    workers = []
    for placement in seating.placements:
        env = {
            **os.environ,
            "RANK": str(placement.rank),
            "WORLD_SIZE": str(len(seating.placements)),
            "LOCAL_RANK": str(placement.local_rank),
            "MASTER_ADDR": seating.address,
            "MASTER_PORT": str(seating.port),
            "SHOAL_NODE": placement.node,
            "OMP_NUM_THREADS": "1",
            **placement.env,
        }
        command = [*placement.prefix, sys.executable, str(script), json.dumps(settings)]
        out = subprocess.PIPE if placement.rank == 0 else subprocess.DEVNULL
        workers.append(subprocess.Popen(command, env=env, stdout=out, text=True))
    try:
        deadline = time.monotonic() + timeout_s
        while workers[0].poll() is None and time.monotonic() < deadline:
            watch([worker.pid for worker in workers if worker.poll() is None])
            time.sleep(0.05)
        output, _ = workers[0].communicate(timeout=1)
        codes = [worker.wait(timeout=60) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    if any(codes):
        raise SystemExit(f"workers ended with {codes}")
    return json.loads(output.splitlines()[-1])


def spread(values: Sequence[float]) -> str:
    """`median (minimum to maximum)`."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def store(name: str, figures: Any) -> Path:
    """Write figures with the machine they were taken on to `benchmarks/results/NAME.json`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    machine = {"cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()}
    document = {"benchmark": name, "time": time.strftime("%F %T"), "machine": machine, "figures": figures}
    path.write_text(json.dumps(document, indent=2) + "\n")
    return path
