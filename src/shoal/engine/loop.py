"""The training loop of one rank: one step after the other (`step.py`), and whatever is due after each."""

from __future__ import annotations

import dataclasses
import time

from shoal.engine.build import Parts
from shoal.engine.crew import Crew, LoopConfig
from shoal.engine.exchange.agreement import Verdict
from shoal.engine.experience import KEY, Experience
from shoal.engine.own_pace import Round
from shoal.engine.pace import InStep
from shoal.engine.progress import Progress
from shoal.engine.snapshot import snapshot
from shoal.engine.step import Stepper
from shoal.wire.traffic import Traffic

TURN = "turn"
"""The reason to leave the loop for the next view."""


class Loop:
    """Trains from one state to the end."""

    def __init__(self, config: LoopConfig, crew: Crew, progress: Progress) -> None:
        self._config = config
        self._crew = crew
        self._stepper = Stepper(config, crew, progress)

    def run(self) -> str:
        """Train until a limit is met; validate and save the end; return the reason to stop.

        Returns TURN, with nothing of that, when all ranks are ready for the next view.

        Raises:
            NonFiniteLossError: a loss became NaN or infinite; that step was not applied.
            PeerLostError: another rank vanished.
        """
        reason = self._overdue() or self._crew.stop_rule.before_step(self.progress)
        self._stepper.rest()
        while reason is None:
            verdict = self._crew.pace.round(self._stepper)
            if not verdict.short_ranks:
                reason = self._after_step(verdict) or self._crew.stop_rule.before_step(self.progress)
                reason = reason or (TURN if verdict.turn else None)
            self._stepper.rest()
        self._stepper.end()
        if reason == TURN:
            self._crew.exchange.turn()
        else:
            self.finish()
        return reason

    def finish(self) -> None:
        """Take no step more: validate and save the state as it is."""
        self._stepper.catch_up()
        self._finish()

    def take_steps(self, last: int) -> None:
        """Take steps up to `last`, and nothing that is due after them."""
        while self.progress.step < last:
            self._crew.pace.round(self._stepper)

    @property
    def progress(self) -> Progress:
        """How far this rank has come."""
        return self._stepper.progress

    @property
    def has_state(self) -> bool:
        """Whether this rank's parameters are those of its progress."""
        return self._stepper.has_state

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

    def drop_step(self) -> None:
        """The step at hand did not commit: nothing of it stays."""
        self._stepper.drop()

    def leave_view(self) -> None:
        """Let go of this view's connections; parts, progress and checkpoints go on in another loop."""
        self._crew.checkpoints.leave()
        self._crew.exchange.close(wait=True)
        if self._crew.copies is not None:
            self._crew.copies.close()
        self._crew.parts.replica.clear_gradients()

    @property
    def midway(self) -> Round | None:
        """Of ranks at their own pace: the round that was broken off, which began at `progress`."""
        pace = self._crew.pace
        return None if isinstance(pace, InStep) else pace.midway

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
        copies = self._crew.copies
        if copies is not None and copies.is_due(step):
            self._stepper.average_buffers()
            copies.begin(self.progress)
        if verdict.stop and reason is None:
            reason = "seconds" if self._crew.stop_rule.out_of_time(self.progress.seconds) else "interrupted"
        return reason

    def _validate(self) -> tuple[str | None, bool]:
        """Measure; return (reason to stop, whether to keep this state as the best)."""
        if self._crew.validator is None:
            return None, False
        self._stepper.catch_up()
        started = time.perf_counter()
        self._stepper.average_buffers()
        with self._crew.exchange.consensus():
            values = self._crew.validator()
        best = values["val_loss"] < self.progress.best_loss
        self._stepper.progress = dataclasses.replace(
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
        self._stepper.catch_up()
        self._stepper.average_buffers()
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


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
