"""The reference for syncs of independent replicas: as many models in one process as there are ranks."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import numpy as np
import torch

from shoal.data.order import shuffled
from shoal.data.partition import spans
from shoal.engine import random_state
from shoal.job.target import resolve

STEPS, BATCH, NUM_SAMPLES, CLIP_NORM, SEED = 14, 12, 50, 0.5, 5
TARGET = str(Path(__file__).parents[1] / "jobs" / "reference.py") + ":job"


class Replica:
    """One rank of the reference."""

    def __init__(self, rank: int) -> None:
        self.job = resolve(TARGET, [f"num_samples={NUM_SAMPLES}"]).load()
        random_state.seed_all(SEED, 0)
        self.data, self.model = self.job.data(), self.job.model()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = self.job.optimizer(self.parameters)
        self.schedule = self.job.schedule(self.optimizer)
        self.rank = rank

    def gradient(self, samples: list[int], scale: float = 1.0) -> float:
        """Of the mean loss over `samples`, times `scale`, clipped. Returns that loss."""
        self.optimizer.zero_grad()
        loss = torch.zeros(())
        if samples:
            loss = scale * self.job.loss(self.model, self.data[torch.tensor(samples)])
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP_NORM)
        return loss.item()

    def update(self) -> None:
        """The optimizer's and the schedule's step."""
        self.optimizer.step()
        self.schedule.step()


def copied(replica: Replica) -> Replica:
    """Another replica of the same state."""
    other = Replica(replica.rank)
    other.model.load_state_dict(replica.model.state_dict())
    other.optimizer.load_state_dict(copy.deepcopy(replica.optimizer.state_dict()))
    other.schedule.load_state_dict(replica.schedule.state_dict())
    return other


def samples_of(step: int, shares: tuple[float, ...]) -> list[list[int]]:
    """What each rank gets in step `step`, counted from 0."""
    epoch, place = divmod(step, -(-NUM_SAMPLES // BATCH))
    order = shuffled(np.arange(NUM_SAMPLES), NUM_SAMPLES, seed=SEED, epoch=epoch)
    chosen = order[place * BATCH : (place + 1) * BATCH]
    return [[int(i) for i in chosen[span.start : span.stop]] for span in spans(len(chosen), shares)]


@cache
def fragments_of(model_parameters: tuple[int, ...], count: int) -> list[list[int]]:
    """The rule of the docs, written anew: consecutive, each closed when it holds its part of what is left."""
    fragments: list[list[int]] = [[]]
    left, size = sum(model_parameters), 0
    for index, bytes_ in enumerate(model_parameters):
        to_come = count - len(fragments)
        if fragments[-1] and to_come:
            full = size + bytes_ / 2 > left / (to_come + 1)
            if full or len(model_parameters) - index == to_come:
                left, size = left - size, 0
                fragments.append([])
        fragments[-1].append(index)
        size += bytes_
    return fragments


def plan_text(sync: str, *, codec: str = "none", steps: int = STEPS, batch: str = "") -> str:
    """A plan for the reference job."""
    return f"""
        seed = {SEED}
        [sync]
        {sync}
        [codec]
        kind = "{codec}"
        [batch]
        size = {BATCH}
        {batch}
        [compute]
        device = "cpu"
        clip_norm = {CLIP_NORM}
        [checkpoint]
        every = 5
        keep = 9
        [stop]
        steps = {steps}
    """
