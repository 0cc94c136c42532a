"""One rank of DistributedDataParallel under torchrun, with snapshots, as PyTorch's tutorial on fault tolerance has it.

Every `every` steps rank 0 writes a snapshot; whenever torchrun starts the workers again, all go on from the last one.
Nothing else in here is about failures: restarting is torchrun's. It writes the events that Shoal's ranks write; an
attempt of torchrun's is a view.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from plain_training import PlainTraining, Stopwatch, seat
from shoal.events import EventLog


def train(settings: dict[str, Any], log: EventLog, epoch: int) -> None:
    """Train from the last snapshot to the end, in the view `epoch`."""
    rank, size = dist.get_rank(), dist.get_world_size()
    training = PlainTraining(settings["job"], settings["set"], settings["batch"], rank, size)
    snapshot, step = Path(settings["snapshot"]), 0
    if snapshot.exists():
        saved = torch.load(snapshot)
        training.load(saved["training"])
        step = saved["step"]
    model = DistributedDataParallel(training.model)
    log.write("view", epoch=epoch, rank=rank, seats=list(range(size)), cause="rendezvous", planned=False, step=step)
    watch = Stopwatch()
    for batch in training.batches(step):
        training.optimizer.zero_grad()
        loss = training.loss(model, batch)
        loss.backward()
        training.optimizer.step()
        if training.schedule is not None:
            training.schedule.step()
        step += 1
        log.write("step", step=step, loss=loss.item(), step_s=watch.lap())
        if step % settings["every"] == 0 and rank == 0:
            temporary = snapshot.with_suffix(".new")
            torch.save({"training": training.state(), "step": step}, temporary)
            temporary.rename(snapshot)


def main() -> None:
    """Train one rank until it is killed."""
    settings = json.loads(sys.argv[1])
    with EventLog(Path(settings["events"]) / f"rank-{seat()}.jsonl", f"rank-{seat()}") as log:
        log.write("run_started", pid=os.getpid(), attempt=os.environ["TORCHELASTIC_RESTART_COUNT"])
        dist.init_process_group("gloo")
        # Not torchrun's own count: nodes do not agree on it when some saw a worker fail and others a node come back.
        train(settings, log, log.path.read_text().count('"kind":"run_started"'))


if __name__ == "__main__":
    main()
