"""The engine's interpreter: performs exchanges on real transports, in lanes.

A lane is one thread with transports of its own, and performs what it is given in the order it was submitted. One order,
the same on every rank, is what keeps collectives from interleaving differently on different ranks. Two lanes keep a
link busy while one of them waits for the last hop of its collective. Threads run beside backward: transports wait
without holding Python's lock.

On a GPU a lane issues its work on a stream of its own, behind what the training stream had queued at submission; `wait`
makes the training stream wait for it, not the CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from shoal.errors import PeerLostError
from shoal.ops import Exchange
from shoal.wire.traffic import Traffic, total
from shoal.wire.transport import Transport
from shoal.wire.waiting import result_unless


def perform(exchange: Exchange, transports: Mapping[str, Transport]) -> Any:
    """Carry out one exchange to its end and return its value."""
    answer: Any = None
    while True:
        try:
            op = exchange.send(answer)
        except StopIteration as stop:
            return stop.value
        answer = transports[op.group].perform(op)


class Lane:
    """One communication thread of one rank."""

    def __init__(self, transports: Mapping[str, Transport], device: torch.device) -> None:
        """`transports` by group name; all belong to this object from now on."""
        self.transports = transports
        self._broken: BaseException | None = None
        self._last: Future[Any] | None = None
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="shoal-communication")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def traffic(self) -> Traffic:
        """What this rank has put on the network so far."""
        return total(transport.traffic for transport in self.transports.values())

    @property
    def bytes_sent(self) -> int:
        """Payload bytes that this rank has put on the network so far."""
        return self.traffic.bytes_sent

    def submit(self, exchange: Exchange) -> Future[Any]:
        """Queue an exchange behind all that were submitted before; give the future to `wait`."""
        if self._stream is None:
            self._last = self._executor.submit(self._perform, exchange)
        else:
            ready = torch.cuda.Event()
            ready.record()
            self._last = self._executor.submit(self._perform_on_stream, exchange, ready)
        return self._last

    def wait(self, future: Future[Any]) -> Any:
        """Wait for an exchange and return its value; raises what went wrong in it (PeerLostError, ...)."""
        value = result_unless(future, self._is_stuck)
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        return value

    def close(self, *, wait: bool = False) -> None:
        """End the thread and its transports; what is still queued is dropped. `wait`: for what has begun.

        Unless it will never end: then the thread is given up.
        """
        self._executor.shutdown(wait=False, cancel_futures=not wait)
        if wait and self._last is not None:
            with contextlib.suppress(Exception):  # it is for those who wait for it
                result_unless(self._last, self._is_stuck)
        for transport in self.transports.values():
            transport.close()

    def _is_stuck(self) -> bool:
        return any(transport.is_stuck for transport in self.transports.values())

    def _perform(self, exchange: Exchange) -> Any:
        """One exchange, unless one before it failed: others still wait for messages of that one, not of this."""
        if self._broken is not None:
            raise PeerLostError(f"an exchange before this one failed: {self._broken}") from self._broken
        try:
            return perform(exchange, self.transports)
        except BaseException as error:
            self._broken = error
            raise

    def _perform_on_stream(self, exchange: Exchange, ready: torch.cuda.Event) -> Any:
        assert self._stream is not None
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            return self._perform(exchange)
