"""`shoal doctor`: what this machine can do for a training, and what to do about what it lacks."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import click
import psutil
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from shoal.cli.container_limits import memory_limit_bytes, quota_cores
from shoal.units import format_bytes

State = Literal["ok", "missing", "problem"]

_GIB = 1024**3
_MIN_SHARED_MEMORY_BYTES = _GIB // 4
_MIN_DISK_BYTES = _GIB
_MIN_AVAILABLE_BYTES = _GIB
_MIN_OPEN_FILES = 1024
# Without these no training runs, whatever else there is.
_ESSENTIAL = frozenset({"torch", "torch.distributed", "gloo", "loopback"})
_SIGNS = {"ok": "[green]✓[/]", "missing": "[yellow]○[/]", "problem": "[red]✗[/]"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        area: what it belongs to: software, machine, devices, network, extras, lab.
        what: its name.
        state: `missing` is something that can be done without, `problem` is something to mend.
        detail: what was found.
        remedy: what to do about it; empty if nothing needs doing.
    """

    area: str
    what: str
    state: State
    detail: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Look at everything and say what was found. Takes as long as importing torch; changes nothing."""
    checks: list[Callable[[], list[Finding]]] = [
        *(_software, _cores, _memory, _shared_memory, _disk, _open_files),
        *(_devices, _backends, _network, _extras, _lab),
    ]
    return [finding for check in checks for finding in check()]


def can_train(findings: list[Finding]) -> bool:
    """Say whether training can work at all here."""
    return not any(finding.what in _ESSENTIAL and finding.state != "ok" for finding in findings)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line of stdout.")
def doctor(as_json: bool) -> None:
    """Say what this machine can do, and what to do about what it lacks.

    The exit code is 1 only if training cannot work here at all.
    """
    findings = examine()
    _print(findings, Console(stderr=as_json))
    if as_json:
        rows = [asdict(finding) for finding in findings]
        click.echo(json.dumps({"can_train": can_train(findings), "findings": rows}))
    if not can_train(findings):
        sys.exit(1)


def _print(findings: list[Finding], console: Console) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for name in ("area", "sign", "what"):
        table.add_column(name, no_wrap=True)
    table.add_column("detail", overflow="fold")
    area = ""
    for finding in findings:
        heading = f"[bold]{escape(finding.area)}[/]" if finding.area != area else ""
        remedy = f"\n[cyan]→ {escape(finding.remedy)}[/]" if finding.remedy else ""
        table.add_row(heading, _SIGNS[finding.state], escape(finding.what), escape(finding.detail) + remedy)
        area = finding.area
    console.print(table)
    console.print(_verdict(findings))


def _verdict(findings: list[Finding]) -> str:
    if not can_train(findings):
        return "\n[red]Training cannot work here:[/] mend what is marked ✗ first."
    problems = sum(finding.state == "problem" for finding in findings)
    rest = f"; {problems} marked ✗ may slow it down or limit it" if problems else ""
    return f"\n[green]Training can work here[/]{rest}."


def _software() -> list[Finding]:
    python = Finding(area="software", what="Python", state="ok", detail=platform.python_version())
    try:
        import torch
    except (ImportError, OSError) as error:
        remedy = "pip install --force-reinstall torch"
        return [python, Finding(area="software", what="torch", state="problem", detail=str(error), remedy=remedy)]
    return [python, Finding(area="software", what="torch", state="ok", detail=str(torch.__version__))]


def _cores() -> list[Finding]:
    ours = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = quota_cores()
    detail = f"{ours} of {os.cpu_count()} usable"
    if quota is None:
        return [Finding(area="machine", what="CPU cores", state="ok", detail=detail)]
    detail += f", and the container allows {quota:g} cores' worth of time"
    # Threads beyond the quota make every step wait for the scheduler.
    short = quota < ours
    remedy = f"start processes with OMP_NUM_THREADS={max(1, int(quota))} in sum, or raise the quota" if short else ""
    state: State = "problem" if short else "ok"
    return [Finding(area="machine", what="CPU cores", state=state, detail=detail, remedy=remedy)]


def _memory() -> list[Finding]:
    memory, limit = psutil.virtual_memory(), memory_limit_bytes()
    detail = f"{format_bytes(memory.available)} available of {format_bytes(memory.total)}"
    if limit is not None and limit < memory.total:
        detail += f", and the container allows {format_bytes(limit)}"
    usable = min(memory.available, limit or memory.available)
    remedy = "end other programs, or take smaller batches" if usable < _MIN_AVAILABLE_BYTES else ""
    state: State = "problem" if remedy else "ok"
    return [Finding(area="machine", what="memory", state=state, detail=detail, remedy=remedy)]


def _shared_memory() -> list[Finding]:
    folder, what = Path("/dev/shm"), "shared memory"
    purpose = "ranks on one machine fall back to loopback"
    if not os.access(folder, os.W_OK):
        remedy = f"mount a tmpfs on {folder}, so that all-reduce between ranks here uses memory"
        detail = f"{folder} is not there or not writable; {purpose}"
        return [Finding(area="machine", what=what, state="missing", detail=detail, remedy=remedy)]
    usage = shutil.disk_usage(folder)
    detail = f"{format_bytes(usage.free)} free of {format_bytes(usage.total)} in {folder}"
    if usage.free >= _MIN_SHARED_MEMORY_BYTES:
        return [Finding(area="machine", what=what, state="ok", detail=detail)]
    remedy = "docker run --shm-size=2g, or in Kubernetes an emptyDir of medium Memory on /dev/shm"
    return [Finding(area="machine", what=what, state="problem", detail=detail, remedy=remedy)]


def _disk() -> list[Finding]:
    try:
        free, writable = shutil.disk_usage(".").free, os.access(".", os.W_OK)
    except OSError as error:
        detail, remedy = f"cannot be read: {error.strerror}", "change to a folder that exists"
        return [Finding(area="machine", what="disk here", state="problem", detail=detail, remedy=remedy)]
    detail = f"{format_bytes(free)} free in the working directory" + ("" if writable else ", not writable")
    remedy = "" if writable and free >= _MIN_DISK_BYTES else "name a folder with room by --run: checkpoints go there"
    state: State = "problem" if remedy else "ok"
    return [Finding(area="machine", what="disk here", state=state, detail=detail, remedy=remedy)]


def _open_files() -> list[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = soft == resource.RLIM_INFINITY or soft >= _MIN_OPEN_FILES
    remedy = "" if enough else f"ulimit -n {min(65536, hard) if hard > 0 else 65536}"
    state: State = "ok" if enough else "problem"
    return [Finding(area="machine", what="open files", state=state, detail=f"limit {soft}", remedy=remedy)]


def _devices() -> list[Finding]:
    try:
        import torch
    except (ImportError, OSError):
        return []
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        detail = f"{len(names)}: {', '.join(dict.fromkeys(names))}"
        return [Finding(area="devices", what="CUDA", state="ok", detail=detail)]
    if shutil.which("nvidia-smi") is None:
        return [Finding(area="devices", what="CUDA", state="missing", detail="no GPU; training runs on the CPU")]
    remedy = "install the CUDA build of torch that fits the driver (nvidia-smi shows it): pytorch.org/get-started"
    detail = "there is a driver, but torch cannot use a GPU"
    return [Finding(area="devices", what="CUDA", state="problem", detail=detail, remedy=remedy)]


def _backends() -> list[Finding]:
    try:
        import torch
        import torch.distributed as dist
    except (ImportError, OSError):
        return []
    if not dist.is_available():
        detail, remedy = "not in this build of torch", "install torch from pypi.org or pytorch.org"
        return [Finding(area="network", what="torch.distributed", state="problem", detail=detail, remedy=remedy)]
    gloo, cuda = dist.is_gloo_available(), torch.cuda.is_available()
    return [
        _backend("gloo", gloo, "collectives between CPUs", "install torch from pypi.org or pytorch.org", needed=True),
        _backend("nccl", dist.is_nccl_available(), "collectives between GPUs", "install the CUDA build", needed=cuda),
        _backend("mpi", dist.is_mpi_available(), "collectives of an MPI library", "", needed=False),
    ]


def _backend(name: str, there: bool, purpose: str, remedy: str, *, needed: bool) -> Finding:
    state: State = "ok" if there else "problem" if needed else "missing"
    detail = purpose if there else f"{purpose}: not in this build of torch"
    return Finding(area="network", what=name, state=state, detail=detail, remedy=remedy if state == "problem" else "")


def _network() -> list[Finding]:
    return [_loopback(), _host_name()]


def _loopback() -> Finding:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=5).close()
    except OSError as error:
        detail, remedy = f"127.0.0.1 does not answer: {error}", "ip link set lo up"
        return Finding(area="network", what="loopback", state="problem", detail=detail, remedy=remedy)
    return Finding(area="network", what="loopback", state="ok", detail="127.0.0.1 answers")


def _host_name() -> Finding:
    name = socket.gethostname()
    try:
        address = str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        remedy = f"add '127.0.1.1 {name}' to /etc/hosts, or its real address if other machines take part"
        detail = f"{name} does not resolve; torch.distributed may fail or wait for the name server"
        return Finding(area="network", what="host name", state="problem", detail=detail, remedy=remedy)
    inside = ", good for ranks on this machine only" if address.startswith("127.") or address == "::1" else ""
    return Finding(area="network", what="host name", state="ok", detail=f"{name} is {address}{inside}")


def _extras() -> list[Finding]:
    """One finding for each package of each extra, as the installed Shoal declares them."""
    try:
        requirements = importlib.metadata.requires("shoal") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    pattern = re.compile(r"([A-Za-z0-9._-]+).*extra\s*==\s*[\"']([\w-]+)[\"']")
    found = (pattern.match(requirement) for requirement in requirements)
    return [_extra(match[1], match[2]) for match in found if match and match[2] != "dev"]


def _extra(package: str, extra: str) -> Finding:
    what = f"{package} ({extra})"
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        remedy = f"pip install 'shoal[{extra}]'"
        return Finding(area="extras", what=what, state="missing", detail="not installed", remedy=remedy)
    return Finding(area="extras", what=what, state="ok", detail=version)


def _lab() -> list[Finding]:
    """What the emulated cluster (`--on lab`) needs; what it lacks is not needed for anything else."""
    try:
        from shoal.launch.lab.rights import availability
    except ImportError as error:
        return [Finding(area="lab", what="lab", state="missing", detail=f"not on this system: {error}")]
    return [
        Finding(area="lab", what="lab", state="ok" if ok else "missing", detail=what, remedy=remedy)
        for what, ok, remedy in availability()
    ]
