"""Follows the coordinator: which view this rank is to train in next, and the connections to its members.

Views arrive on the coordinator's client's thread. One that is not planned cuts the connections of the view at hand at
once, so that whoever waits in an exchange is freed; a planned one is connected meanwhile, and taken up when all are
ready.
"""

from __future__ import annotations

import functools
import os
import secrets
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from shoal.cluster.attendance import Attendance, Hello, Listener, worded
from shoal.cluster.membership_events import MEMBERS, PLACE, SUCCESSOR, Waiting
from shoal.cluster.views import View
from shoal.engine.build import Connected
from shoal.engine.patience import Watch
from shoal.engine.start import Start, fingerprint
from shoal.engine.views.connecting import Connecting
from shoal.errors import PeerLostError
from shoal.job.target import Target
from shoal.plan import Plan, for_ranks
from shoal.wire.addresses import own_address
from shoal.wire.control import ControlClient
from shoal.wire.transport import MemoryPool

COORDINATOR, TOKEN = "SHOAL_COORDINATOR", "SHOAL_TOKEN"
_AUTHORITY = "SHOAL_AUTHORITY"  # the certificate that vouches for the coordinator; without it there is no TLS
NEIGHBOURS = "SHOAL_NODE_WORKERS"  # of this node, this one included: they share its cores
_WORD_S = 0.5  # how often a rank that waits looks whether there is something to tell


class Following(Listener):
    """One rank's way from view to view.

    Attributes:
        attendance: the coordinator's client.
        pool: memory that outlives a view.
        has_stopped: this rank was asked to stop, or to leave, while there were too few to train with.
        latest: the view that was decided upon last, with this rank or without.
    """

    def __init__(
        self,
        start: Start,
        plan: Plan,
        target: Target,
        device: torch.device,
        node: str,
        env: Mapping[str, str],
        way_out: Watch,
    ) -> None:
        """Say hello: from now on this rank may be made a member.

        `way_out`: watches that this rank comes here again once its view is broken: nobody is waited for on the way.
        """
        self._way_out, self._is_in_view = way_out, False
        self._start, self._plan, self._device, self._log = start, plan, device, start.log
        self._changed = threading.Condition()
        self._current: Connecting | None = None
        self._next: Connecting | None = None
        self._excluded_from = 0  # the epoch of a view that does without us
        self.latest: View | None = None
        self._lost_at: float | None = None
        self._step = 0
        self._is_leaving = False
        self._notice: threading.Timer | None = None
        self.has_stopped = False
        self._coordinator_port = int(env[COORDINATOR].rsplit(":", 1)[1])
        self.pool = MemoryPool()
        address = own_address(env)
        self._server = dist.TCPStore(address, 0, None, True, wait_for_workers=False)
        self.attendance = Attendance(
            functools.partial(
                ControlClient,
                env[COORDINATOR],
                token=env.get(TOKEN, ""),
                authority=Path(env[_AUTHORITY]) if env.get(_AUTHORITY) else None,
            ),
            Hello(
                run=str(start.run.read_info()["id"]),
                member=f"{node}-{os.getpid()}-{secrets.token_hex(4)}",
                seat=start.seat,
                node=node,
                store=f"{address}:{self._server.port}",
                fingerprint=dict(fingerprint(plan, target)),
            ),
            lease_s=plan.elastic.lease_s,
            listener=self,
        )
        start.stop_request.on_flip = self._damage_next
        signal.signal(signal.SIGTERM, lambda *_: self._hand_in_notice())

    def next(self) -> Connecting | None:
        """The view to train in next, as soon as it is known.

        Returns None when others go on without this rank, as planned or since it was asked to stop or leave while it
        waits for a place; and when it was asked to while it waits for more members (`has_stopped`).

        Raises:
            RunEnded: another rank's failure, or the launcher's, ended the run.
        """
        self.leave_view()
        told: Waiting | None = None
        epoch = self._current.view.epoch if self._current else 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._next is not None or self._excluded_from > epoch, _WORD_S)
                if self._next is not None:
                    self._current, self._next = self._next, None
                    self._is_in_view = True
                    return self._current
                goes = told is not None and told.what == PLACE and self._is_ending()
                if goes or self._excluded_from > epoch or (self._is_leaving and self._current is None):
                    self._log.write("left", step=self._step)
                    return None
            self.attendance.next_view(epoch, 0.0)  # raises what ended the run
            if self.attendance.waiting != told:
                told = self.attendance.waiting
                if told:
                    self._log.write("waiting", message=worded(told))
            if told is not None and told.what == MEMBERS and self._is_ending():
                self.has_stopped = True
                if self._notice is not None:
                    self._notice.cancel()  # nobody else may hold what this rank is about to save
                return None

    def connected(self, connecting: Connecting) -> Connected:
        """Wait until the view's members are connected.

        Raises:
            PeerLostError: one could not be reached, or another view took this one's place.
        """
        with self._changed:
            self._changed.wait_for(lambda: connecting.is_done or self._next is not None)
        if not connecting.is_done:
            raise PeerLostError(f"view {connecting.view.epoch} was replaced before it was formed")
        return connecting.result()

    def is_ready(self) -> bool:
        """Whether this rank could turn to the next view, or go, after the step at hand."""
        following, current = self._next, self._current
        if current is not None and self._excluded_from > current.view.epoch:
            return True
        return following is not None and following.view.planned and following.is_ready

    def committed(self, epoch: int, step: int) -> None:
        """A step counts."""
        self._lost_at, self._step = None, step
        self.attendance.progress(epoch, step)

    def lost(self, connecting: Connecting, error: PeerLostError) -> None:
        """The view broke: tell the coordinator, and let go of it."""
        self._lost_at = self._lost_at or time.perf_counter()
        connecting.close()
        self.pool.release()
        self._log.write("view_lost", epoch=connecting.view.epoch, message=str(error))
        self.attendance.broken(connecting.view.epoch, str(error))

    @property
    def lost_s(self) -> float | None:
        """Seconds since a loss was noticed, if no step was committed since."""
        return None if self._lost_at is None else time.perf_counter() - self._lost_at

    # What the coordinator's client tells, on its thread.

    def on_view(self, view: View) -> None:
        """The coordinator decided who trains together."""
        rank = view.rank_of(self._start.seat)
        with self._changed:
            self.latest = view
            if self._next is not None:
                self._next.close()
                self._next = None
            if self._current is not None and self._is_over(self._current.view, view):
                self._break()
            if rank is None:
                self._excluded_from = view.epoch
            else:
                plan = for_ranks(self._plan, len(view.members))
                self._next = Connecting(
                    view,
                    rank,
                    plan,
                    self._device,
                    on_done=self._notify,
                    exempt_port=self._coordinator_port,
                    pool=self.pool,
                )
            self._changed.notify_all()

    def on_waiting(self, waiting: Waiting) -> None:
        """Too few are left for another view, and so the one at hand is broken."""
        with self._changed:
            if waiting.what == MEMBERS and self._current is not None:
                self._break()

    def on_stop(self) -> None:
        """The launcher wants training to end."""
        self._start.stop_request.set()

    def on_contact(self, seat: int, epoch: int, away_s: float) -> None:
        """Noted in the log."""
        self._log.write("coordinator_found", seat=seat, epoch=epoch, away_s=round(away_s, 3))

    def on_contact_lost(self, message: str) -> None:
        """Noted in the log."""
        self._log.write("coordinator_lost", message=message)

    def _break(self) -> None:
        assert self._current is not None
        self._lost_at = self._lost_at or time.perf_counter()
        self._current.cut()
        if self._is_in_view:
            self._way_out.begin("the way out of a broken view")

    @staticmethod
    def _is_over(current: View, view: View) -> bool:
        """Whether nobody trains in `current` any more, now that there is `view`.

        Also where one between them was missed: this rank was cut off, and the others' farewells may never have come.
        """
        return not view.planned or view.epoch > current.epoch + 1

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _damage_next(self) -> None:
        """A rehearsal: a byte of the next message goes wrong."""
        current = self._current
        if current is not None and current.connected is not None:
            current.connected.world.damage_next()

    def _hand_in_notice(self) -> None:
        """SIGTERM: this machine is about to be taken away.

        Who trains alone stops the run. Any other only goes, and who waits for members saves what it holds before.
        """
        current = self._current
        waiting = self.attendance.waiting
        trains = waiting is None or waiting.what == SUCCESSOR
        if current is not None and len(current.view.members) == 1 and trains:
            self._start.stop_request.set()
            return
        self._is_leaving = True
        self.attendance.leaving()
        self._notice = threading.Timer(self._plan.elastic.notice_s, self._leave_at_once)
        self._notice.daemon = True
        self._notice.start()

    def leave_view(self) -> None:
        """This rank waits in no exchange of a view any more."""
        with self._changed:
            self._is_in_view = False
            self._way_out.end()

    def _is_ending(self) -> bool:
        """Whether this rank was asked to stop, with all others, or to leave them."""
        return self._is_leaving or bool(self._start.stop_request)

    def _leave_at_once(self) -> None:
        """The notice is over, and the others cannot do without this rank: they keep the state, and wait for more."""
        self._log.write("left", step=self._step)
        self.attendance.close()
        os._exit(0)
