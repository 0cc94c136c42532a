"""A client's requests: what is asked of which server, and the future that several of them answer together."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor

from shoal.errors import ServerLostError, WireError
from shoal.wire.frame import Header, Message

T = TypeVar("T")


@dataclass(slots=True)
class Request:
    """One message to one server.

    Attributes:
        holders: the servers that can answer, the preferred one first.
        server: the one that was asked last.
        what: for error messages: "the push of layer.weight".
        arrived: called with the answer as soon as it is here.
    """

    header: Header
    tensors: Sequence[tuple[str, Tensor]]
    holders: tuple[int, ...]
    what: str
    arrived: Callable[[Message], None] | None = None
    server: int = -1
    answer: Message | None = None
    error: WireError | None = None

    @property
    def done(self) -> bool:
        return self.answer is not None or self.error is not None


class Pending(Generic[T]):
    """The result of a push or a pull that is under way. Bytes move by themselves; `result` waits for the rest."""

    def __init__(
        self, requests: Sequence[Request], pump: Callable[[float], None], finish: Callable[[], T], timeout_s: float
    ) -> None:
        self._requests = requests
        self._pump = pump
        self._finish = finish
        self._timeout_s = timeout_s
        self._result: list[T] = []

    def done(self) -> bool:
        """Whether `result` would return at once. Does not wait."""
        if not all(request.done for request in self._requests):
            self._pump(0.0)
        return all(request.done for request in self._requests)

    def result(self, timeout_s: float | None = None) -> T:
        """Wait for every answer.

        Args:
            timeout_s: how long at most, from now on; None is the client's own `timeout_s`.

        Raises:
            ServerLostError: a server vanished, or stayed silent for that long, and no other holds what was asked.
            ServerRefusedError: a server refused; its reason is in the message.
        """
        if self._result:
            return self._result[0]
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + limit_s
        for request in self._requests:
            while not request.done:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise ServerLostError(
                        f"server {request.server} did not answer {request.what} within {limit_s:g} s: it is overloaded "
                        "or stopped, or (bsp, ssp) another worker is behind; raise timeout_s or look at its log"
                    )
                self._pump(left)
            if request.error is not None:
                raise request.error
        self._result.append(self._finish())
        return self._result[0]


def answered(value: Any) -> Pending[Any]:
    """A pending result that is there already."""
    return Pending((), lambda _: None, lambda: value, 0.0)
