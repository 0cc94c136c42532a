"""The live display: rare drawings, plain lines without a terminal, and an estimate only where there is a limit."""

from __future__ import annotations

import io

import pytest
from event_logs import event, started, step, training
from rich.console import Console

from shoal.dashboard.folding import fold
from shoal.dashboard.history import History
from shoal.dashboard.progress import LiveProgress, plain_line, progress_share, remaining_s, render


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def drawn(history: History, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(render(history))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def validation(t: float, number: int) -> dict:
    return event(t, "rank-0", "validation", step=number, loss=2.0, metrics={"accuracy": 0.5}, best=True)


def with_stop(**stop: object) -> History:
    """100 steps in 10 s under the limits `stop`."""
    steps = [step(1000 + number / 10, 0, number) for number in range(1, 101)]
    return fold([started(1000.0, 0, 1, stop=stop), *steps])


def test_without_a_terminal_there_are_plain_lines_without_control_codes() -> None:
    out, clock = io.StringIO(), Clock()
    with LiveProgress(Console(file=out), clock) as progress:
        progress.update(fold(training(1, 10)))
    lines = out.getvalue().splitlines()
    assert len(lines) == 1
    assert "\x1b" not in out.getvalue()
    assert "step 10/400" in lines[0]
    assert "samples/s" in lines[0]


def test_plain_lines_come_every_five_seconds_and_at_once_for_a_validation_or_a_warning() -> None:
    out, clock, history = io.StringIO(), Clock(), fold(training(1, 10))
    with LiveProgress(Console(file=out), clock) as progress:
        for tenth in range(100):  # ten seconds
            clock.now_s = 100.0 + tenth / 10
            fold([step(1002.0 + tenth / 10, 0, 11 + tenth)], history)
            progress.update(history)
        assert len(out.getvalue().splitlines()) == 2
        progress.update(fold([validation(1013.0, 110)], history))
        assert len(out.getvalue().splitlines()) == 3
        progress.update(fold([event(1013.0, "rank-0", "warning", message="slow link")], history))
        progress.update(history)
    assert out.getvalue().count("warning: slow link") == 1


def test_a_terminal_is_drawn_at_most_four_times_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, drawings = Clock(), []
    with LiveProgress(Console(file=io.StringIO(), force_terminal=True), clock) as progress:
        monkeypatch.setattr(progress._live, "update", lambda *_, **__: drawings.append(clock.now_s))
        for millisecond in range(0, 2000, 10):
            clock.now_s = 100.0 + millisecond / 1000
            progress.update(History())
    assert 3 <= len(drawings) <= 9


def test_leaving_draws_the_last_state_and_nothing_twice() -> None:
    out, clock = io.StringIO(), Clock()
    with LiveProgress(Console(file=out), clock) as progress:
        history = fold(training(1, 10))
        progress.update(history)
        progress.update(fold([step(1001.2, 0, 11)], history))
    assert [line.split(",")[0] for line in out.getvalue().splitlines()] == ["step 10/400", "step 11/400"]


def test_nothing_happened_is_drawn_too() -> None:
    assert "waiting for the first step" in drawn(History())
    with LiveProgress(Console(file=io.StringIO())) as progress:
        progress.update(History())


def test_the_display_shows_what_was_asked_of_it() -> None:
    saved = event(1001.0, "rank-0", "checkpoint_saved", step=10, path="x", size_bytes=2048, stall_s=0, write_s=0)
    warned = event(1001.0, "rank-2", "warning", message="a slow link")
    text = drawn(fold([*training(1, 10), validation(1001.0, 10), saved, warned]))
    for words in ("charlm.py:job", "4 ranks", "step 10/400", "epoch 0.1", "val 2.000", "accuracy", "lr 0.001"):
        assert words in text
    for words in ("samples/s", "MB/s on the wire", "rank 3", "compute  50%", "2.0 KiB", "a slow link"):
        assert words in text


def test_null_losses_and_steps_of_no_time_are_drawn() -> None:
    odd = [step(1002.0 + number, 0, number, loss=None, lr=None, epoch=None, step_s=0.0) for number in (11, 12)]
    history = fold([*training(1, 10), *odd])
    assert "loss     -" in drawn(history)
    assert "loss -" in plain_line(history)


def test_many_ranks_are_counted_instead_of_drawn() -> None:
    text = drawn(fold(training(1, 2, world_size=64)))
    assert "and 57 more ranks" in text
    assert len(text.splitlines()) < 20


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    assert all(len(line) <= width for line in drawn(fold(training(1, 10)), width).splitlines())


def test_the_nearest_limit_decides_what_remains() -> None:
    history = with_stop(steps=1000, epochs=None, seconds=20, until=None, patience=None)
    assert progress_share(history) == (pytest.approx(0.5), "seconds")
    assert remaining_s(history) == pytest.approx(10.0)


def test_epochs_are_counted_by_the_steps_that_one_takes() -> None:
    assert remaining_s(with_stop(epochs=4)) == pytest.approx(30.0)


def test_without_a_countable_limit_nothing_is_promised_but_the_aim_is_named() -> None:
    history = with_stop(steps=None, epochs=None, seconds=None, until="val_loss<=1.9", patience=3)
    assert remaining_s(history) is None
    assert "left" not in plain_line(history)
    assert "until val_loss<=1.9" in drawn(history)
    assert "patience 3" in drawn(history)
