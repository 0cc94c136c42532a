"""A rank's way from view to view, whatever it holds. What is made of one view: `elastic.py` and `shards/rank.py`."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

from shoal.engine import build
from shoal.engine.build import Connected
from shoal.engine.checkpoint.archive import Archive
from shoal.engine.checkpoint.session import CheckpointSession
from shoal.engine.garbage import let_go
from shoal.engine.loop import TURN, Loop
from shoal.engine.patience import Endless, Patience, Watch, end_this_process
from shoal.engine.start import Start, target_of_run
from shoal.engine.telling import Context, announce, conclude
from shoal.engine.turnover import Turnover
from shoal.engine.views.connecting import Connecting
from shoal.engine.views.following import NEIGHBOURS, Following
from shoal.errors import PeerLostError
from shoal.job.job import Job
from shoal.plan import Plan, load_plan
from shoal.strategy.topology import Topology


class AttendingRank(ABC):
    """One process's course through views.

    Attributes:
        views: says which view is next, once this rank has said hello.
    """

    views: Following

    def __init__(self, start: Start, node: str, env: Mapping[str, str]) -> None:
        self._start, self._log = start, start.log
        self._plan: Plan = load_plan(start.run.plan)
        self._target = target_of_run(start.run)
        self._job: Job = self._target.load()
        here = Topology(0, (node,))
        self._device = build.choose_device(self._plan.compute, here)
        build.set_threads(self._plan.compute, Topology(0, here.nodes * int(env.get(NEIGHBOURS, "1"))))
        self._started: float | None = None
        self._current: Connecting | None = None
        self._checkpoints: CheckpointSession | None = None
        self._way_out = self._watch(if_idle=True)

    def train(self) -> None:
        """Go through views until training ends, or this rank has left.

        Raises:
            RunEnded: another rank's failure, or the launcher's, ended the run.
        """
        while (connecting := self.views.next()) is not None:
            try:
                if self._train_in(connecting):
                    return
            except PeerLostError as error:
                self.views.lost(connecting, error)
        if self.views.has_stopped:
            self._stop_waiting()

    @abstractmethod
    def _enter(self, connecting: Connecting, before: Connecting | None) -> Callable[[], bool]:
        """Go over to a view: agree on the state, and build what is of this view. Others wait meanwhile.

        Returns:
            What trains there, and returns whether training has ended, and not only this view.

        Raises:
            PeerLostError: a member was lost; the state is that of the last committed step.
        """

    @abstractmethod
    def _stop_waiting(self) -> None:
        """Asked to stop, or to leave, while too few are left."""

    def _watch(self, *, if_idle: bool = False) -> Watch:
        """What ends this rank when something that waits for nobody takes longer than `elastic.stuck_after_s`."""
        limit_s = self._plan.elastic.stuck_after_s
        return Patience(limit_s, self._end_stuck, if_idle=if_idle) if limit_s else Endless()

    def _end_stuck(self, what: str, stack: str) -> None:
        """This rank will never come to the next exchange: better that the others lose it than that they wait."""
        self._log.write(
            "stuck",
            message=f"seat {self._start.seat} ended itself, so that the others go on: {what} took longer than "
            f"elastic.stuck_after_s = {self._plan.elastic.stuck_after_s:g}; where it stood is in "
            f"logs/rank-{self._start.seat}.log",
            stack=stack,
        )
        print(f"stuck in {what}:\n{stack}", file=sys.stderr, flush=True)
        end_this_process()

    def _train_in(self, connecting: Connecting) -> bool:
        before, self._current = self._current, connecting
        try:
            follow = self._enter(connecting, before)
        finally:
            if before is not None:
                # Not earlier: nobody is there any more who waits for what this rank sent last. And beside training.
                threading.Thread(target=let_go, args=(before.close,), daemon=True, name="shoal-closing").start()
        return follow()

    def _announced(self, loop: Loop, connected: Connected) -> Context:
        """What tells of training in one view; it has told of its beginning, if this is the first."""
        context = Context(
            self._start.run, connected.plan, self._target, connected.world, connected.topology, self._device,
            self._log, self._start.seat,
        )  # fmt: skip
        if self._started is None:
            self._started = time.perf_counter()
            announce(context, loop)
        return context

    def _to_the_end(self, loop: Loop, context: Context, turn: Callable[[], None]) -> bool:
        """Train in one view; return whether training has ended. `turn` is called before all turn to a planned view.

        Raises:
            PeerLostError: a member was lost; the step at hand is dropped.
        """
        assert self._started is not None
        try:
            reason = self._run(loop)
            if reason == TURN:
                turn()
                return False
            with contextlib.suppress(PeerLostError):  # all have what they need
                context.world.sum([0.0])
            self.views.leave_view()
            self.views.attendance.finished(reason)
            conclude(context, loop, self._job, reason, time.perf_counter() - self._started)
            return True
        except PeerLostError:
            assert self._current is not None
            self._current.cut()  # else a thread of ours may wait for somebody who waits for us
            loop.drop_step()
            raise

    def _run(self, loop: Loop) -> str:
        return loop.run()

    def _checkpoints_in(self, connected: Connected) -> CheckpointSession:
        config = self._plan.checkpoint
        if self._checkpoints is None:
            archive = Archive(self._start.run.checkpoints, keep=config.keep, keep_best=config.best)
            self._checkpoints = CheckpointSession(connected.world, archive, self._log, connected.device)
        else:
            self._checkpoints.enter(connected.world)
        return self._checkpoints

    def _turnover_in(self, epoch: int) -> Turnover:
        views = self.views
        return Turnover(
            self._start.stop_request,
            views.is_ready,
            lambda step: views.committed(epoch, step),
            views.attendance.leaving,
        )

    def _warn_of_stopping(self, step: int) -> None:
        lost = "; steps since the last checkpoint are in no file" if step else ""
        self._log.write("warning", message=f"seat {self._start.seat} stopped while it waited for members{lost}")
