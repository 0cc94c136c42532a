"""The process of one rank: `python -m shoal.engine.worker RUN [--resume]`, started by a launcher or by torchrun.

It reads everything from the run directory, joins the others, trains, and reports its end as an event. Its exit code is
0 when training ended by itself and 1 when this rank failed or saw another fail; when its launcher goes away, it is
killed. How it joins, and what becomes of it when another rank fails, is `static.py`'s (all ranks from beginning to end)
or `views/elastic.py`'s (ranks that come and go).
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

from shoal.engine import control, static
from shoal.engine.start import Start
from shoal.engine.telling import named, report
from shoal.engine.views import elastic
from shoal.events import EventLog
from shoal.run import Run


def main() -> None:
    """Run one rank and end the process; nothing returns from here."""
    run, resume = Run(Path(sys.argv[1])), "--resume" in sys.argv[2:]
    way: Any = elastic if elastic.is_asked_for(os.environ) else static
    seat = way.seat_from(os.environ)
    with EventLog(run.events / f"rank-{seat}.jsonl", f"rank-{seat}", patience_s=way.DISK_PATIENCE_S) as log:
        try:
            logging.captureWarnings(True)
            way.work(Start(run, seat, log, control.listen(os.environ), resume))
            code = 0
        except BaseException as error:
            report(named(error, run, way.node_from(os.environ)), log)
            code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # not sys.exit: after a failure the communication thread may wait for a peer for ever


if __name__ == "__main__":
    main()
