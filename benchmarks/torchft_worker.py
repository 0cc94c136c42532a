"""One replica of a fault-tolerant training by torchft, after its own example `train_ddp.py`.

Gradients are averaged by torchft's DistributedDataParallel, or by calls of its manager's all-reduce. It writes the
events that Shoal's ranks write; a quorum of torchft's is a view.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from torchft import DistributedDataParallel, Manager, ProcessGroupGloo

from plain_training import PlainTraining, Stopwatch, seat
from shoal.events import EventLog


def train(settings: dict[str, Any], log: EventLog) -> None:
    """Train until killed."""
    size = settings["size"]
    training = PlainTraining(settings["job"], settings["set"], settings["batch"], seat(), size)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=5)),
        min_replica_size=settings["min_replicas"],
        load_state_dict=training.load,
        state_dict=training.state,
        replica_id=f"benchmark_{seat()}",
        timeout=timedelta(seconds=30),
    )
    model: Any = DistributedDataParallel(manager, training.model) if settings["ddp"] else training.model
    quorum, watch = None, Stopwatch()
    for batch in training.batches(0):
        # What torchft's Optimizer does in zero_grad and step, so that it can be seen whether a step was committed.
        manager.start_quorum()
        training.optimizer.zero_grad()
        loss = training.loss(model, batch)
        loss.backward()
        if not settings["ddp"]:
            average(training, manager)
        if not manager.should_commit():
            log.write("view_lost", epoch=quorum, message=str(manager.errored() or "not committed")[:400])
            continue
        training.optimizer.step()
        if training.schedule is not None:
            training.schedule.step()
        step = manager.current_step()
        if manager._quorum_id != quorum:
            quorum, seats = manager._quorum_id, list(range(manager.num_participants()))
            log.write("view", epoch=quorum, seats=seats, cause="quorum", planned=False, step=step - 1)
        log.write("step", step=step, loss=loss.item(), step_s=watch.lap())


def average(training: PlainTraining, manager: Manager) -> None:
    """All-reduce every gradient; the manager takes note of what fails."""
    works = [manager.allreduce(p.grad) for p in training.model.parameters() if p.grad is not None]
    for work in works:
        work.wait()


def main() -> None:
    """Train one replica."""
    logging.basicConfig(level=logging.INFO)
    settings = json.loads(sys.argv[1])
    with EventLog(Path(settings["events"]) / f"rank-{seat()}.jsonl", f"rank-{seat()}") as log:
        log.write("run_started", pid=os.getpid(), attempt=os.environ.get("TORCHELASTIC_RESTART_COUNT"))
        train(settings, log)


if __name__ == "__main__":
    main()
