"""Two ranks as processes of their own, one of which may freeze or die."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from typing import Any


def run_pair(script: str, *arguments: str) -> Any:
    """Run `script RANK PORT ARGUMENTS` for ranks 0 and 1, at a free port; return what rank 0 printed, as JSON.

    When rank 0 has ended, or after a minute, both are killed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", script]
    processes = [
        subprocess.Popen([*command, str(rank), str(port), *arguments], stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    try:
        said, _ = processes[0].communicate(timeout=60)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return json.loads(said)
