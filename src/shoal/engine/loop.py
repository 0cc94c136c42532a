"""The training loop of one rank: batch, backward, exchange, update; then whatever is due after the step.

A step commits when every rank's exchange is complete and every loss was finite; before that nothing has changed.
"""

from __future__ import annotations

import dataclasses
import time

import torch.distributed as dist
from torch import Tensor

from shoal.data.loader import Batch
from shoal.engine.build import Parts
from shoal.engine.crew import Crew, LoopConfig
from shoal.engine.exchange.agreement import Ballot, Verdict
from shoal.engine.experience import KEY, Experience
from shoal.engine.own_pace import Round
from shoal.engine.pace import InStep
from shoal.engine.progress import Progress
from shoal.engine.replicas import BufferAverage, UndoneBuffers
from shoal.engine.snapshot import snapshot
from shoal.errors import NonFiniteLossError
from shoal.wire.traffic import Traffic

TURN = "turn"
"""The reason to leave the loop for the next view."""


class Loop:
    """Trains from one state to the end."""

    def __init__(self, config: LoopConfig, crew: Crew, progress: Progress) -> None:
        self._config = config
        self._crew = crew
        self._average_buffers = BufferAverage(crew.parts.model, config.weight, self._sum_buffer)
        self._buffers = UndoneBuffers(crew.parts.model) if config.survives else None
        self._data_s = self._compute_s = 0.0  # of the last step that counts
        self._clock = _Clock(progress.seconds)
        self._free_at = time.perf_counter()
        self._newcomer = crew.newcomer
        self.progress = progress

    def run(self) -> str:
        """Train until a limit is met; validate and save the end; return the reason to stop.

        Returns TURN, with nothing of that, when all ranks are ready for the next view.

        Raises:
            NonFiniteLossError: a loss became NaN or infinite; that step was not applied.
            PeerLostError: another rank vanished.
        """
        reason = self._overdue() or self._crew.stop_rule.before_step(self.progress)
        self._free_at = time.perf_counter()
        while reason is None:
            verdict = self._crew.pace.round(self)
            if not verdict.short_ranks:
                reason = self._after_step(verdict) or self._crew.stop_rule.before_step(self.progress)
                reason = reason or (TURN if verdict.turn else None)
            self._free_at = time.perf_counter()
        if reason == TURN:
            self._crew.exchange.turn()
        else:
            self._catch_up()
            self._finish()
        return reason

    def take_steps(self, last: int) -> None:
        """Take steps up to `last`, and nothing that is due after them."""
        while self.progress.step < last:
            self._crew.pace.round(self)

    @property
    def parts(self) -> Parts:
        """What this rank trains with."""
        return self._crew.parts

    @property
    def experience(self) -> Experience:
        """What was learned of the machines so far, the same on every rank but for what checkpoints cost."""
        return Experience.of(self._crew.division, self._crew.cadence)

    @property
    def traffic(self) -> Traffic:
        """What this rank has sent to each other rank in this attempt."""
        return self._crew.exchange.traffic

    @property
    def bytes_sent(self) -> int:
        """Payload bytes that this rank has put on the network in this attempt."""
        return self._crew.exchange.bytes_sent

    @property
    def unsaved(self) -> str | None:
        """Why the last checkpoint could not be written, if it could not."""
        return self._crew.checkpoints.failed

    def close(self) -> None:
        """End the threads of checkpoints and communication."""
        self._crew.checkpoints.close()
        self._crew.exchange.close()

    def leave_view(self) -> None:
        """Let go of this view's connections; parts, progress and checkpoints go on in another loop."""
        self._crew.checkpoints.leave()
        self._crew.exchange.close(wait=True)
        self._crew.parts.replica.clear_gradients()

    def drop_step(self) -> None:
        """The step at hand did not commit: nothing of it stays."""
        if self._buffers is not None:
            self._buffers.undo()

    def take(self, batch: Batch, reached: Progress, clock: int) -> Verdict:
        """One step: train on `batch`, which leads to `reached`; return what the ranks agreed on.

        `clock` is the number of the global batch that this is a part of. If the verdict names ranks that ran out of
        memory, there was no step, and the same global batch is to be taken again.
        """
        crew, started, loaded = self._crew, self._free_at, time.perf_counter()
        if self._buffers is not None:
            self._buffers.begin()
        crew.exchange.begin(batch, clock)
        crew.stopwatch.start()
        crew.computation.backward(batch, crew.exchange, self._ballot)
        crew.stopwatch.stop()
        verdict = crew.exchange.finish()
        if verdict.short_ranks:
            self._give_up(batch, verdict)
            return verdict
        self._check_finite(verdict)
        if self._config.clip_norm is not None:
            crew.exchange.clip(self._config.clip_norm)
        waited = time.perf_counter()
        rate = crew.parts.optimizer.param_groups[0]["lr"]
        if self._newcomer is None:
            self._update()
        else:
            self._newcomer.keep()
            crew.exchange.release()
        ended = time.perf_counter()
        samples = reached.samples - self.progress.samples
        self.progress = dataclasses.replace(reached, seconds=self._clock.seconds(), loss=verdict.loss)
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

    def _give_up(self, batch: Batch, verdict: Verdict) -> None:
        """Some rank ran out of memory: nothing of this step stays, and it gets less from now on.

        Raises:
            PlanError: less would not help.
        """
        self.drop_step()
        self._crew.exchange.release()
        self._crew.division.dropped(batch.size, verdict.short_ranks)
        self._divide()

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
            self._catch_up()

    def _update(self) -> None:
        parts = self._crew.parts
        self._crew.exchange.install()
        self._crew.checkpoints.before_update()
        if self._crew.giving is not None:
            self._crew.giving.before_update()
        parts.optimizer.step()
        if parts.schedule is not None:
            parts.schedule.step()
        self._crew.exchange.release()
        parts.replica.publish()

    def _check_finite(self, verdict: Verdict) -> None:
        if verdict.non_finite_ranks:
            ranks = ", ".join(map(str, verdict.non_finite_ranks))
            raise NonFiniteLossError(
                f"the loss is not finite at step {self.progress.step + 1} on rank {ranks}; that step was not applied, "
                f"and {self._crew.checkpoints.last_good()}. Try a lower learning rate, a warm-up, or compute.clip_norm"
            )

    def settle(self) -> None:
        """Wait until everything that this rank has told others is known to them."""
        self._crew.exchange.settle()

    def wants_to_stop(self) -> bool:
        timed_out = self._config.rank == 0 and self._crew.stop_rule.out_of_time(self._clock.seconds())
        return timed_out or bool(self._crew.turnover.stop)

    def _ballot(self) -> Ballot:
        crew, cold = self._crew, self._newcomer is not None
        due = crew.cadence is not None and crew.cadence.is_due(self.progress.step + 1)
        return Ballot(
            stop=self.wants_to_stop(),
            turn=crew.turnover.is_ready() and not cold,
            cold=cold,
            save=due and self._config.rank == 0,
            data_s=self._data_s,
            compute_s=self._compute_s,
        )

    @property
    def midway(self) -> Round | None:
        """Of ranks at their own pace: the round that was broken off, which began at `progress`."""
        pace = self._crew.pace
        return None if isinstance(pace, InStep) else pace.midway

    @property
    def has_state(self) -> bool:
        """Whether this rank's parameters are those of its progress."""
        return self._newcomer is None

    def _catch_up(self) -> None:
        """Before anybody looks at this rank's parameters, they must be there."""
        if self._newcomer is None:
            return
        started = time.perf_counter()
        steps = self._newcomer.catch_up()
        self._newcomer = None
        took_s = time.perf_counter() - started
        self._crew.log.write("caught_up", step=self.progress.step, steps=steps, seconds=took_s)

    def _divide(self) -> None:
        """From the next step on, divide batches as it was decided."""
        division, pace = self._crew.division, self._crew.pace
        assert isinstance(pace, InStep), "shares are for ranks that go in step"
        self._average_buffers.weight = division.shares[self._config.rank] / sum(division.shares)
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

    def _overdue(self) -> str | None:
        """What was due after the last step of a view that ended before it was done."""
        if not self.progress.step or self.midway is not None:
            return None
        return self._after_step(Verdict(self.progress.loss, [], stop=False))

    def _after_step(self, verdict: Verdict) -> str | None:
        """Validate and save if it is due."""
        step, reason, best = self.progress.step, None, False
        if _due(step, self._config.validate_every) and self.progress.validated_step != step:
            reason, best = self._validate()
        due = verdict.save or _due(step, self._config.checkpoint_every)
        if best or (due and self._crew.checkpoints.saved_step != step):
            self._save(best=best)
        if verdict.stop and reason is None:
            reason = "seconds" if self._crew.stop_rule.out_of_time(self.progress.seconds) else "interrupted"
        return reason

    def _validate(self) -> tuple[str | None, bool]:
        """Measure; return (reason to stop, whether to keep this state as the best)."""
        if self._crew.validator is None:
            return None, False
        self._catch_up()
        started = time.perf_counter()
        self._average_buffers()
        with self._crew.exchange.consensus():
            values = self._crew.validator()
        best = values["val_loss"] < self.progress.best_loss
        self.progress = dataclasses.replace(
            self.progress,
            val_loss=values["val_loss"],
            metrics={name: value for name, value in values.items() if name != "val_loss"},
            validated_step=self.progress.step,
            best_loss=min(values["val_loss"], self.progress.best_loss),
            stale=0 if best else self.progress.stale + 1,
        )
        if self._config.rank == 0:
            self._crew.log.write(
                "validation",
                step=self.progress.step,
                loss=values["val_loss"],
                metrics=self.progress.metrics,
                seconds=time.perf_counter() - started,
                best=best,
            )
        return self._crew.stop_rule.after_validation(values, self.progress), best and self._config.keep_best

    def _save(self, *, best: bool, final: bool = False) -> None:
        crew = self._crew
        self._catch_up()
        self._average_buffers()
        told = {
            "progress": self.progress.to_plain(),
            "layout": dict(self._config.layout),
            KEY: self.experience.to_plain(),
        }
        taken = snapshot(
            crew.parts, crew.exchange, told, writes_pieces=self._config.writes_pieces, may_change=not final
        )
        crew.checkpoints.save(self.progress.step, taken.state, taken.private, crew.parts.model.buffers(), best=best)
        if crew.cadence is not None:
            crew.cadence.begun(self.progress.step)
        if taken.must_wait:
            crew.checkpoints.wait()

    def _finish(self) -> None:
        best, changed = False, self._crew.exchange.conclude()
        if (changed or self.progress.validated_step != self.progress.step) and self._config.validate_every:
            _, best = self._validate()
        if changed or best or self._crew.checkpoints.saved_step != self.progress.step:
            self._save(best=best, final=True)
        self._crew.checkpoints.wait()


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


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
