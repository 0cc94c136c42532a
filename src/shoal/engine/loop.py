"""The training loop of one rank: batch, backward, exchange, update; then whatever is due after the step.

A step commits when every rank's exchange is complete and every loss was finite; before that nothing has changed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from shoal.data.loader import Batch
from shoal.engine.build import Parts
from shoal.engine.checkpoint.pieces import KEY, fits_twice, pieces_of
from shoal.engine.checkpoint.session import CheckpointSession
from shoal.engine.computation import Computation
from shoal.engine.exchange import ReplicaExchange
from shoal.engine.exchange.agreement import Ballot, Verdict
from shoal.engine.exchange.base import copied
from shoal.engine.handover import Giving
from shoal.engine.layout.optimizer_state import named_state
from shoal.engine.newcomer import Newcomer
from shoal.engine.pace import InStep, OwnPace
from shoal.engine.progress import Progress
from shoal.engine.replicas import BufferAverage, UndoneBuffers
from shoal.engine.stopping import StopRule
from shoal.engine.turnover import Turnover
from shoal.engine.validation import Validator
from shoal.errors import NonFiniteLossError
from shoal.events import EventLog
from shoal.wire.groups import World
from shoal.wire.traffic import Traffic

TURN = "turn"
"""The reason to leave the loop for the next view."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What the loop needs of the plan.

    Attributes:
        weight: this rank's part of every batch; all ranks' sum to 1.
        validate_every, checkpoint_every: periods in steps; 0: never.
        layout: the sizes of the axes.
        survives: a step may fail and be taken again.
        writes_pieces: of the ranks that hold the same values, this one writes them into checkpoints.
    """

    rank: int
    weight: float
    clip_norm: float | None
    validate_every: int
    checkpoint_every: int
    keep_best: bool
    writes_pieces: bool
    layout: Mapping[str, int]
    survives: bool = False


@dataclass(frozen=True, kw_only=True)
class Crew:
    """The parts that the loop calls upon."""

    parts: Parts
    computation: Computation
    exchange: ReplicaExchange
    checkpoints: CheckpointSession
    validator: Validator | None
    pace: InStep | OwnPace
    stop_rule: StopRule
    turnover: Turnover
    world: World
    log: EventLog
    newcomer: Newcomer | None = None
    giving: Giving | None = None


class Loop:
    """Trains from one state to the end."""

    def __init__(self, config: LoopConfig, crew: Crew, progress: Progress) -> None:
        self._config = config
        self._crew = crew
        self._average_buffers = BufferAverage(crew.parts.model, config.weight, self._sum_buffer)
        self._buffers = UndoneBuffers(crew.parts.model) if config.survives else None
        self._busy_s = 0.0
        self._clock = _Clock(progress.seconds)
        self._free_at = time.perf_counter()
        self._newcomer = crew.newcomer
        self._with_newcomers = False
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
            self._welcome(verdict)
            reason = self._after_step(verdict) or self._crew.stop_rule.before_step(self.progress)
            reason = reason or (TURN if verdict.turn else None)
            self._free_at = time.perf_counter()
        if reason != TURN:
            self._catch_up()
            self._finish()
        return reason

    @property
    def parts(self) -> Parts:
        """What this rank trains with."""
        return self._crew.parts

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

        `clock` is the number of the global batch that this is a part of.
        """
        crew, started, loaded = self._crew, self._free_at, time.perf_counter()
        if self._buffers is not None:
            self._buffers.begin()
        crew.exchange.begin(batch, clock)
        crew.computation.backward(batch, crew.exchange, self._ballot)
        computed = time.perf_counter()
        verdict = crew.exchange.finish()
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
        self._busy_s = computed - started
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
            data_s=loaded - started,
            compute_s=computed - loaded,
            wait_s=waited - computed,
            optimizer_s=ended - waited,
            bytes_sent=self._clock.lap_bytes(crew.exchange.bytes_sent),
        )
        self._free_at = time.perf_counter()
        return verdict

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
        cold = self._newcomer is not None
        turn = self._crew.turnover.is_ready() and not cold
        return Ballot(stop=self.wants_to_stop(), turn=turn, cold=cold, seconds=self._busy_s)

    @property
    def has_state(self) -> bool:
        """Whether this rank's parameters are those of its progress."""
        return self._newcomer is None

    def _welcome(self, verdict: Verdict) -> None:
        """Give newcomers their share once all of them have the state: every rank after the same step."""
        if self._with_newcomers and not verdict.cold:
            self._divide((1.0,) * self._crew.world.size)
        self._with_newcomers = verdict.cold
        if self._newcomer is not None and self._newcomer.can_catch_up:
            self._catch_up()

    def _catch_up(self) -> None:
        """Before anybody looks at this rank's parameters, they must be there."""
        if self._newcomer is None:
            return
        started = time.perf_counter()
        steps = self._newcomer.catch_up()
        self._newcomer = None
        took_s = time.perf_counter() - started
        self._crew.log.write("caught_up", step=self.progress.step, steps=steps, seconds=took_s)

    def _divide(self, shares: tuple[float, ...]) -> None:
        """From the next step on, divide batches by `shares`."""
        self._average_buffers.weight = shares[self._config.rank] / sum(shares)
        pace = self._crew.pace
        assert isinstance(pace, InStep), "shares are for ranks that go in step"
        pace.divide(shares, self.progress)

    def _sum_buffer(self, buffer: Tensor) -> None:
        peers = self._crew.parts.replica.peers
        if peers is None:
            self._crew.world.everybody.all_reduce(buffer)
        else:
            dist.all_reduce(buffer, group=peers)

    def _overdue(self) -> str | None:
        """What was due after the last step of a view that ended before it was done."""
        return self._after_step(Verdict(self.progress.loss, [], stop=False)) if self.progress.step else None

    def _after_step(self, verdict: Verdict) -> str | None:
        """Validate and save if it is due."""
        step, reason, best = self.progress.step, None, False
        if _due(step, self._config.validate_every) and self.progress.validated_step != step:
            reason, best = self._validate()
        if best or (_due(step, self._config.checkpoint_every) and self._crew.checkpoints.saved_step != step):
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
        parts = self._crew.parts
        self._catch_up()
        self._average_buffers()
        private = self._crew.exchange.state_dict()
        if not self._crew.exchange.replicas_equal:
            schedule = parts.schedule.state_dict() if parts.schedule else None
            private |= copied({"optimizer": parts.optimizer.state_dict(), "schedule": schedule})
        model, optimizer = self._crew.exchange.model_state(), named_state(parts.optimizer, parts.replica)
        if not parts.replica.is_whole:
            pieces = pieces_of(parts.replica, model, optimizer) if self._config.writes_pieces else {}
            final = final or not fits_twice(pieces)
            private[KEY] = pieces if final else copied(pieces)
            model, optimizer = {}, {}
        state: dict[str, Any] = {
            "model": model,
            "optimizer": optimizer,
            "schedule": parts.schedule.state_dict() if parts.schedule else None,
            "progress": self.progress.to_plain(),
            "layout": dict(self._config.layout),
        }
        self._crew.checkpoints.save(self.progress.step, state, private, parts.model.buffers(), best=best)
        if final:
            self._crew.checkpoints.wait()

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
