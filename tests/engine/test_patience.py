"""What takes too long is told once, and what only waits is not."""

from __future__ import annotations

import threading
import time

from shoal.engine.patience import Patience

LIMIT_S = 0.2


def watched() -> tuple[Patience, list[tuple[str, str]], threading.Event]:
    told: list[tuple[str, str]] = []
    over = threading.Event()

    def give_up(what: str, stack: str) -> None:
        told.append((what, stack))
        over.set()

    return Patience(LIMIT_S, give_up), told, over


def test_own_work_that_takes_too_long_is_told_with_where_it_stands() -> None:
    patience, told, over = watched()
    patience.begin("loading samples")
    assert over.wait(20 * LIMIT_S)
    [(what, stack)] = told
    assert what == "loading samples"
    assert "over.wait" in stack


def test_work_that_ends_in_time_is_not_told_however_often_it_comes() -> None:
    patience, told, _ = watched()
    for _ in range(20):
        patience.begin("forward")
        time.sleep(LIMIT_S / 10)
    patience.end()
    assert not told


def test_waiting_for_others_may_take_as_long_as_it_likes() -> None:
    patience, told, over = watched()
    patience.begin("forward")
    patience.end()
    assert not over.wait(3 * LIMIT_S)
    assert not told


def test_much_to_do_is_no_standing_still() -> None:
    """Under `if_idle`, who works may take as long as it likes."""
    over = threading.Event()
    patience = Patience(LIMIT_S, lambda *_: over.set(), if_idle=True)
    patience.begin("the way out")
    until = time.monotonic() + 4 * LIMIT_S
    while time.monotonic() < until:
        sorted(range(10000))
    assert not over.is_set()
    assert over.wait(20 * LIMIT_S), "now it stands still"
