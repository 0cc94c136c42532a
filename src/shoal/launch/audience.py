"""Who looks on while a launcher runs workers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from shoal.events import Event


def _ignore(_: object) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Audience:
    """What a launcher tells while it works.

    Attributes:
        watch: is given new events a few times a second, and once at the end.
        notice: is given sentences for the person at the terminal.
    """

    watch: Callable[[list[Event]], None] = _ignore
    notice: Callable[[str], None] = _ignore
