"""Pieces of a run drawn for a terminal, for the live display and the report: numbers, bars, the loss curve."""

from __future__ import annotations

import signal

from rich.text import Text

from shoal.dashboard.curve import Point, apportion, braille, loss_lines, loss_range, place, validation_marks
from shoal.dashboard.history import History
from shoal.dashboard.records import Breakdown
from shoal.units import format_bytes

# Colour and shade, so that a bar can be read where there are no colours.
PART_STYLES = {
    "data": ("▓", "yellow"),
    "compute": ("█", "blue"),
    "wait": ("░", "red"),
    "optimizer": ("▒", "green"),
    "other": ("·", "bright_black"),
}


def number(value: float | None, digits: int = 4) -> str:
    """`2.3456789` -> `2.346`; None (unknown, or not finite) -> `-`."""
    return "-" if value is None else f"{value:#.{digits}g}".rstrip(".")


def rate(value: float | None) -> str:
    """`1234.5` -> `1,234`; `0.1234` -> `0.123`."""
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def exit_words(rank: int, exit_code: int) -> str:
    """`(2, -9)` -> `rank 2 was ended by SIGKILL`; `(1, 3)` -> `rank 1 ended with exit code 3`."""
    names = {one.value: one.name for one in signal.Signals}
    if -exit_code in names:
        return f"rank {rank} was ended by {names[-exit_code]}"
    return f"rank {rank} ended with exit code {exit_code}"


def printable(text: str) -> str:
    """Replace what a terminal would obey instead of showing (a model may write any character) by `·`."""
    return "".join(sign if sign.isprintable() or sign in "\n\t" else "·" for sign in text)


def time_bar(breakdown: Breakdown, width: int) -> Text:
    """Draw one bar of `width` characters, divided as the time was, and the shares of the named parts."""
    parts, total_s, bar = breakdown.parts(), breakdown.total_s, Text(no_wrap=True)
    for name, cells in zip(parts, apportion(list(parts.values()), width), strict=True):
        shade, style = PART_STYLES[name]
        bar.append(shade * cells, style)
    if total_s > 0:
        for name in ("data", "compute", "wait"):
            bar.append(f"  {name} ", "bright_black").append(f"{parts[name] / total_s:4.0%}")
    return bar


def legend() -> Text:
    """Say which colour of a time bar is what."""
    line = Text(no_wrap=True)
    for name, (shade, style) in PART_STYLES.items():
        line.append(f"{shade * 2} ", style).append(f"{name}   ", "bright_black")
    return line


def rank_bars(history: History, width: int, *, recent: bool, limit: int = 16) -> list[Text]:
    """One time bar for each rank, of its recent steps or of all; the ranks past `limit` are only counted."""
    ranks = [rank for _, rank in sorted(history.ranks.items()) if rank.steps]
    shown = ranks if len(ranks) <= limit else ranks[: limit - 1]
    lines = []
    for rank in shown:
        line = Text(f"rank {rank.rank:<3} ", no_wrap=True)
        lines.append(line.append_text(time_bar(rank.recent_total() if recent else rank.total, width)))
    if len(shown) < len(ranks):
        lines.append(Text(f"and {len(ranks) - len(shown)} more ranks", "bright_black"))
    return lines


def loss_plot(history: History, columns: int, rows: int) -> list[Text]:
    """Draw the smoothed training loss over steps as a line, and validation losses as dots, with its axes.

    Returns no lines if no loss is known.
    """
    line, marks = loss_lines(history, by_seconds=False)[1], validation_marks(history, by_seconds=False)
    if not line and not marks:
        return []
    steps = [x for x, _ in line + marks]
    x, y = (min(steps), max(steps)), loss_range(line, marks)
    drawn = _with_marks(braille(line, (columns, rows), x, y), marks, x, y)
    return [*_with_labels(drawn, y), _step_axis(x, columns)]


def _with_marks(rows: list[str], marks: list[Point], x: Point, y: Point) -> list[Text]:
    drawn = [Text(row, "cyan", no_wrap=True) for row in rows]
    cells = [list(row) for row in rows]
    for step, loss in marks:
        cells[-1 - place(loss, y, len(rows))][place(step, x, len(cells[0]))] = "●"
    for text, row in zip(drawn, cells, strict=True):
        text.plain = "".join(row)
        text.highlight_regex("●", "bold yellow")
    return drawn


def _with_labels(rows: list[Text], y: Point) -> list[Text]:
    labelled = []
    for index, row in enumerate(rows):
        value = y[1] - (index + 0.5) * (y[1] - y[0]) / len(rows)
        label = number(value) if index in (0, len(rows) // 2, len(rows) - 1) else ""
        labelled.append(Text(f"{label:>9} ┤" if label else f"{'':>9} │", "bright_black").append_text(row))
    return labelled


def _step_axis(x: Point, columns: int) -> Text:
    first, last = f"{x[0]:.0f}", f"{x[1]:.0f} steps"
    gap = max(1, columns - len(first) - len(last))
    return Text(f"{'':>9} └{'─' * columns}\n{'':>11}{first}{'':>{gap}}{last}", "bright_black")


def saved_line(history: History) -> str:
    """Say what the last checkpoint is; an empty string if there is none."""
    if not history.checkpoints:
        return ""
    last = history.checkpoints[-1]
    return f"step {last.step} ({format_bytes(last.size_bytes)})"
