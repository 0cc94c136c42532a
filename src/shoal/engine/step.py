"""One step of one rank: batch, backward, exchange, update.

A step commits when every rank's exchange is complete and every loss was finite; before that nothing has changed.
"""

from __future__ import annotations

import dataclasses
import time

import torch.distributed as dist
from torch import Tensor

from shoal.data.loader import Batch
from shoal.engine.crew import Crew, LoopConfig
from shoal.engine.exchange.agreement import Ballot, Verdict
from shoal.engine.pace import InStep
from shoal.engine.progress import Progress
from shoal.engine.replicas import BufferAverage, UndoneBuffers
from shoal.errors import NonFiniteLossError


class Stepper:
    """Takes steps, from one state on.

    Attributes:
        progress: how far this rank has come.
        average_buffers: gives every rank the mean of buffers that training changes.
    """

    def __init__(self, config: LoopConfig, crew: Crew, progress: Progress) -> None:
        self._config = config
        self._crew = crew
        self._buffers = UndoneBuffers(crew.parts.model) if config.survives else None
        self._data_s = self._compute_s = 0.0  # of the last step that counts
        self._clock = _Clock(progress.seconds)
        self._newcomer = crew.newcomer
        self.average_buffers = BufferAverage(crew.parts.model, config.weight, self._sum_buffer)
        self.progress = progress
        self._free_at = time.perf_counter()

    def rest(self) -> None:
        """From now on, time counts for the next step."""
        self._free_at = time.perf_counter()
        if isinstance(self._crew.pace, InStep):  # else the next part may be waited for
            self._crew.patience.begin("loading samples")

    def end(self) -> None:
        """There is no next step."""
        self._crew.patience.end()

    @property
    def has_state(self) -> bool:
        """Whether this rank's parameters are those of its progress."""
        return self._newcomer is None

    def take(self, batch: Batch, reached: Progress, clock: int) -> Verdict:
        """One step: train on `batch`, which leads to `reached`; return what the ranks agreed on.

        `clock` is the number of the global batch that this is a part of. If the verdict names ranks that ran out of
        memory, there was no step, and the same global batch is to be taken again.
        """
        crew, started, loaded = self._crew, self._free_at, time.perf_counter()
        if self._buffers is not None:
            self._buffers.begin()
        crew.patience.end()
        crew.exchange.begin(batch, clock)
        crew.patience.begin("forward")
        crew.stopwatch.start()
        crew.computation.backward(batch, crew.exchange, self._ballot)
        crew.stopwatch.stop()
        verdict = crew.exchange.finish()
        if crew.giving is not None:
            crew.giving.go_on()
        if verdict.short_ranks:
            self._give_up(batch, verdict)
            return verdict
        self._check_finite(verdict)
        if self._config.clip_norm is not None:
            crew.exchange.clip(self._config.clip_norm)
        waited = time.perf_counter()
        rate = crew.parts.optimizer.param_groups[0]["lr"]
        samples = reached.samples - self.progress.samples
        reached = dataclasses.replace(reached, seconds=self._clock.seconds(), loss=verdict.loss)
        if self._newcomer is None:
            self._update(reached)
        else:
            self._newcomer.keep()
            crew.exchange.release()
        ended = time.perf_counter()
        self.progress = dataclasses.replace(reached, seconds=self._clock.seconds())
        if self._buffers is not None:
            self._buffers.commit()
        self._data_s = loaded - started
        self._compute_s = max(0.0, crew.stopwatch.seconds() - crew.exchange.stalled_s)
        crew.turnover.committed(self.progress.step)
        crew.log.write(
            "step",
            step=self.progress.step,
            epoch=batch.cursor.epoch,
            first=batch.first,
            loss=verdict.loss,
            lr=float(rate),
            samples=samples,
            share=batch.share,
            step_s=ended - started,
            data_s=self._data_s,
            compute_s=self._compute_s,
            wait_s=max(0.0, waited - loaded - self._compute_s),
            optimizer_s=ended - waited,
            bytes_sent=self._clock.lap_bytes(crew.exchange.bytes_sent),
        )
        self._learn(verdict, batch.size, ended - started)
        self._free_at = time.perf_counter()
        return verdict

    def drop(self) -> None:
        """The step at hand did not commit: nothing of it stays."""
        self._crew.patience.end()
        if self._crew.giving is not None:
            self._crew.giving.go_on()
        if self._buffers is not None:
            self._buffers.undo()

    def catch_up(self) -> None:
        """Before anybody looks at this rank's parameters, they must be there."""
        if self._newcomer is None:
            return
        started = time.perf_counter()
        steps = self._newcomer.catch_up()
        self._newcomer = None
        took_s = time.perf_counter() - started
        self._crew.log.write("caught_up", step=self.progress.step, steps=steps, seconds=took_s)

    def settle(self) -> None:
        """Wait until everything that this rank has told others is known to them."""
        self._crew.exchange.settle()

    def wants_to_stop(self) -> bool:
        timed_out = self._config.rank == 0 and self._crew.stop_rule.out_of_time(self._clock.seconds())
        return timed_out or bool(self._crew.turnover.stop)

    def _update(self, reached: Progress) -> None:
        parts = self._crew.parts
        self._crew.exchange.install()
        self._crew.checkpoints.before_update()
        if self._crew.giving is not None:
            self._crew.giving.before_update()
        if self._crew.gate is not None:
            self._crew.gate.enter(reached)
        parts.optimizer.step()
        if parts.schedule is not None:
            parts.schedule.step()
        self._crew.exchange.release()
        parts.replica.publish()

    def _learn(self, verdict: Verdict, batch_size: int, step_s: float) -> None:
        """Draw from a step that counts what it says of the machines: every rank the same."""
        crew = self._crew
        measured = crew.division.committed(batch_size, verdict)
        if measured is not None and crew.lookout is not None:
            crew.lookout.look(self.progress.step - 1, measured)
        if crew.cadence is not None:
            crew.cadence.stepped(step_s, crew.checkpoints)
        if crew.division.follow(measured, cold=verdict.cold):
            self._divide()
        if self._newcomer is not None and self._newcomer.can_catch_up:
            self.catch_up()

    def _give_up(self, batch: Batch, verdict: Verdict) -> None:
        """Some rank ran out of memory: nothing of this step stays, and it gets less from now on.

        Raises:
            PlanError: less would not help.
        """
        self.drop()
        self._crew.exchange.release()
        self._crew.division.dropped(batch.size, verdict.short_ranks)
        self._divide()

    def _check_finite(self, verdict: Verdict) -> None:
        if verdict.non_finite_ranks:
            ranks = ", ".join(map(str, verdict.non_finite_ranks))
            raise NonFiniteLossError(
                f"the loss is not finite at step {self.progress.step + 1} on rank {ranks}; that step was not applied, "
                f"and {self._crew.checkpoints.last_good()}. Try a lower learning rate, a warm-up, or compute.clip_norm"
            )

    def _ballot(self) -> Ballot:
        crew, cold = self._crew, self._newcomer is not None
        crew.patience.end()
        if crew.giving is not None:
            crew.giving.make_way()
        due = crew.cadence is not None and crew.cadence.is_due(self.progress.step + 1)
        return Ballot(
            stop=self.wants_to_stop(),
            turn=crew.turnover.is_ready() and not cold,
            cold=cold,
            save=due and self._config.rank == 0,
            data_s=self._data_s,
            compute_s=self._compute_s,
        )

    def _divide(self) -> None:
        """From the next step on, divide batches as it was decided."""
        division, pace = self._crew.division, self._crew.pace
        assert isinstance(pace, InStep), "shares are for ranks that go in step"
        self.average_buffers.weight = division.shares[self._config.rank] / sum(division.shares)
        pace.divide(division.shares, self.progress)
        if self._config.rank == 0:
            speeds = division.seconds_per_sample
            self._crew.log.write(
                "rebalanced", step=self.progress.step, shares=division.counts, seconds_per_sample=speeds
            )

    def _sum_buffer(self, buffer: Tensor) -> None:
        peers = self._crew.parts.replica.peers
        if peers is None:
            self._crew.world.everybody.all_reduce(buffer)
        else:
            dist.all_reduce(buffer, group=peers)


class _Clock:
    """Seconds of training over all attempts, and bytes since the last step."""

    def __init__(self, before_s: float) -> None:
        self._start = time.perf_counter() - before_s
        self._bytes = 0

    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def lap_bytes(self, total: int) -> int:
        lap, self._bytes = total - self._bytes, total
        return lap
