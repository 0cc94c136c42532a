"""The live display of a training on stderr; a plain line every few seconds where that is no terminal.

It shares the cores with the training: it draws at most every half second and looks at a bounded number of values.
Reading the event log is the caller's: `progress.update(fold(reader.poll(), history))`, as often as it likes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from shoal.dashboard.curve import sparkline
from shoal.dashboard.history import History
from shoal.dashboard.records import RECENT_STEPS
from shoal.dashboard.terminal import legend, number, rank_bars, rate, saved_line
from shoal.units import format_bytes, format_duration

REFRESH_S = 0.5
PLAIN_REFRESH_S = 5.0
_SPARK_COLUMNS = 24
_BAR_COLUMNS = 30


class LiveProgress:
    """Shows a run while it trains: a context manager; leaving it draws the last state once more.

    Args:
        console: where to draw; None is the terminal on stderr.
        clock: monotonic seconds, for tests.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = Console(stderr=True) if console is None else console
        self._clock = clock
        self._live: Live | None = None
        self._history: History | None = None
        self._drawn_t = -float("inf")
        self._validations_told = 0
        self._warnings_told = 0
        self._told = (0, 0)  # the step and the number of validations of the last plain line

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            # stdout is not ours: `--json` is read there.
            self._live = Live(console=self._console, auto_refresh=False, redirect_stdout=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._history is not None:
            self._draw(self._history)
        if self._live is not None:
            self._live.stop()

    def update(self, history: History) -> None:
        """Draw `history` if the last drawing is old enough; in plain lines also for news."""
        self._history = history
        if self._clock() - self._drawn_t >= self._interval_s() or self._has_news(history):
            self._draw(history)

    def _interval_s(self) -> float:
        return PLAIN_REFRESH_S if self._live is None else REFRESH_S

    def _has_news(self, history: History) -> bool:
        told = (self._validations_told, self._warnings_told)
        return self._live is None and told != (len(history.validations), len(history.warnings))

    def _draw(self, history: History) -> None:
        self._drawn_t = self._clock()
        if self._live is not None:
            self._live.update(render(history), refresh=True)
            return
        for note in history.warnings[self._warnings_told :]:
            self._say(f"warning: {note.message}")
        now = (history.step, len(history.validations))
        if history.points and now != self._told:
            self._told = now
            self._say(plain_line(history))
        self._validations_told, self._warnings_told = len(history.validations), len(history.warnings)

    def _say(self, line: str) -> None:
        # Past rich, which would wrap the line at 80 columns.
        self._console.file.write(line + "\n")
        self._console.file.flush()


def plain_line(history: History) -> str:
    """Say how far the run is in one line without control codes."""
    words = [
        _position(history),
        f"loss {number(history.loss)}",
        *_validation_words(history),
        f"{rate(history.samples_per_s(RECENT_STEPS))} samples/s",
        f"{format_bytes(history.wire_bytes_per_s())}/s on the wire",
        _clock_words(history),
    ]
    return " | ".join(words)


def render(history: History) -> Group:
    """Draw the whole live display."""
    if not history.points:
        return Group(_head(history), Text("waiting for the first step", "bright_black"), *_notes(history))
    lines = [_head(history), _loss_line(history), _speed_line(history), _time_line(history)]
    lines += rank_bars(history, _BAR_COLUMNS, recent=True, limit=8)
    lines.append(_row("", legend()))
    return Group(*lines, *_notes(history))


def progress_share(history: History) -> tuple[float, str] | None:
    """Return the used share (0 to 1) of the nearest limit, and its name; None if none can be counted."""
    limits, epoch = _limits(history), _epochs_done(history)
    done = {"steps": history.step, "epochs": epoch or 0.0, "seconds": history.seconds}
    shares = [(min(1.0, done[name] / limits[name]), name) for name in done if _positive(limits.get(name))]
    return max(shares, default=None)


def _epochs_done(history: History) -> float | None:
    """Passes over the data so far, with their fraction where it is known how many steps one takes."""
    per_epoch = history.started.get("steps_per_epoch")
    if isinstance(per_epoch, int) and per_epoch > 0:
        return history.step / per_epoch
    return history.points[-1].epoch if history.points else None


def remaining_s(history: History) -> float | None:
    """Seconds until the nearest limit if it goes on as fast as so far; None if no limit can be counted.

    An aim (`until`, `patience`) may end the run earlier: it cannot be foreseen and is not counted.
    """
    share = progress_share(history)
    if share is None or share[0] <= 0:
        return None
    return history.seconds * (1 - share[0]) / share[0]


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and value > 0


def _head(history: History) -> Text:
    started = history.started
    words = [f"{max(1, history.world_size)} ranks" if history.world_size != 1 else "1 rank"]
    if _positive(started.get("num_parameters")):
        words.append(f"{started['num_parameters']:,} parameters")
    if history.points:
        words.append(_position(history))
    if history.resumed_at:
        words.append(f"resumed at step {history.resumed_at[-1]}")
    head = Text(no_wrap=True, overflow="ellipsis").append(history.title or "starting", "bold cyan")
    return head.append("  " + "  ·  ".join(words))


def _position(history: History) -> str:
    limits = _limits(history)
    total, epoch, epochs = limits.get("steps"), _epochs_done(history), limits.get("epochs")
    words = f"step {history.step}" + (f"/{total}" if total else "")
    if epoch is not None:
        words += f", epoch {epoch:.2f}" + (f"/{epochs:g}" if _positive(epochs) else "")
    return words


def _loss_line(history: History) -> Text:
    spark = sparkline(_sampled_losses(history), _SPARK_COLUMNS)
    line = Text(no_wrap=True).append(f"{number(history.loss)}  ", "bold").append(spark, "cyan")
    for words in _validation_words(history):
        line.append(f"  {words}")
    lr = history.points[-1].lr
    return _row("loss", line if lr is None else line.append(f"  lr {lr:.3g}", "bright_black"))


def _sampled_losses(history: History) -> list[float | None]:
    """At most about 16 losses for each column of the sparkline, evenly from the whole curve."""
    stride = max(1, len(history.points) // (8 * _SPARK_COLUMNS))
    return [point.loss for point in history.points[::stride]]


def _validation_words(history: History) -> list[str]:
    if not history.validations:
        return []
    last, best = history.validations[-1], history.best
    words = [f"val {number(last.loss)}"]
    words += [f"{name} {number(value)}" for name, value in list(last.metrics.items())[:3]]
    if best is not None and best.step != last.step:
        words.append(f"best {number(best.loss)} at step {best.step}")
    return words


def _speed_line(history: History) -> Text:
    step_s = history.step_s_median(RECENT_STEPS)
    words = [
        f"{rate(history.samples_per_s(RECENT_STEPS))} samples/s",
        f"{format_duration(step_s or 0.0)} a step",
        f"{history.wire_bytes_per_s() / 1e6:.3g} MB/s on the wire",
    ]
    return _row("speed", Text("   ".join(words), no_wrap=True))


def _time_line(history: History) -> Text:
    share = progress_share(history)
    line = Text(no_wrap=True)
    if share is not None:
        full = round(share[0] * _BAR_COLUMNS)
        line.append("━" * full, "cyan").append("━" * (_BAR_COLUMNS - full), "bright_black")
        line.append(f" {share[0]:4.0%}  ")
    return _row("time", line.append(_clock_words(history)))


def _clock_words(history: History) -> str:
    share, left_s = progress_share(history), remaining_s(history)
    words = f"{format_duration(history.seconds)} elapsed"
    if share is not None and left_s is not None:
        words += f", about {format_duration(left_s)} left (limit: {share[1]})"
    return words + "".join(f", {aim}" for aim in _aims(history))


def _aims(history: History) -> list[str]:
    """What may end the run before its limits."""
    limits, aims = _limits(history), []
    if limits.get("until"):
        aims.append(f"until {limits['until']}")
    if _positive(limits.get("patience")):
        aims.append(f"patience {limits['patience']}")
    return aims


def _limits(history: History) -> dict[str, Any]:
    stop = history.started.get("stop")
    return stop if isinstance(stop, dict) else {}


def _notes(history: History) -> list[Text]:
    lines = []
    if history.checkpoints:
        ago = format_duration(max(0.0, history.seconds - history.checkpoints[-1].seconds))
        lines.append(_row("saved", Text(f"{saved_line(history)}, {ago} ago", no_wrap=True)))
    for note in history.warnings[-3:]:
        times = f" ({note.count} times)" if note.count > 1 else ""
        lines.append(_row("warning", Text(f"{note.message}{times}", "yellow")))
    for failure in history.failures[history.failures_before :][:3]:
        lines.append(_row("error", Text(f"{failure.source}: {failure.error}: {failure.message}", "red")))
    return lines


def _row(name: str, content: Text) -> Text:
    return Text(f"{name:<9}", "bright_black", no_wrap=True, overflow="ellipsis").append_text(content)
