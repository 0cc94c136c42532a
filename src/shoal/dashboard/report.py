"""The report of a run: `report.html` and `loss.png` in its folder, and the same in short for a terminal.

It reads the event log, plan.toml and run.json, and works on a run that runs, was killed, or took no step at all.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from shoal.dashboard.folding import fold
from shoal.dashboard.history import History
from shoal.dashboard.terminal import exit_words, legend, loss_plot, number, printable, rank_bars, rate, saved_line
from shoal.events import read_events
from shoal.run import Run, write_atomic
from shoal.units import format_bytes, format_duration

_PLOT_COLUMNS, _PLOT_ROWS = 72, 12
_MAX_SAMPLE_LINES = 16


def read_history(run: Run) -> History:
    """Fold all events of `run`.

    Raises:
        RunError: it is not a run directory, or its run.json is damaged.
    """
    run.read_info()
    return fold(read_events(run.events))


def write_report(run: Run) -> Path:
    """Write `run.report` (one HTML page that needs no other file) and `run.curve` (PNG), and return the page's path.

    Raises:
        RunError: it is not a run directory, or its run.json is damaged.
    """
    # matplotlib takes half a second, which a training that only prints its end need not wait for.
    from shoal.dashboard.page import PageText, build_page
    from shoal.dashboard.picture import draw_loss

    info, history = run.read_info(), read_history(run)
    plan = run.plan.read_text(encoding="utf-8", errors="replace") if run.plan.exists() else ""
    page = build_page(history, PageText(run=run.path.name, plan=plan, info=info))
    write_atomic(run.curve, draw_loss(history))
    write_atomic(run.report, page.encode("utf-8", errors="replace"))
    return run.report


def print_report(run: Run, console: Console) -> None:
    """Print the report in short: headline, loss curve, where the time went, sample, and where the files are.

    Raises:
        RunError: it is not a run directory, or its run.json is damaged.
    """
    history = read_history(run)
    console.print(Text(f"{history.title or run.path.name}  ", "bold cyan").append_text(_state(history)))
    console.print(_headline(history))
    parts = (_curve, _bars, _layout, _members, _sample, _troubles)
    for lines in (*(part(history) for part in parts), _paths(run)):
        if lines:
            console.print()
        for line in lines:
            console.print(line, soft_wrap=True)


def _state(history: History) -> Text:
    if history.state == "finished":
        return Text(f"finished: {history.reason}", "green")
    words = {"failed": "failed", "unfinished": "no end was recorded", "empty": "no step was taken"}
    return Text(words[history.state], "red" if history.state == "failed" else "yellow")


def _headline(history: History) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 3, 0, 0))
    step_s = history.step_s_median()
    left = {
        "steps": f"{history.step:,}",
        "samples": f"{history.samples:,}",
        "training time": format_duration(history.seconds),
        "median step": "-" if step_s is None else format_duration(step_s),
        "samples/s": rate(history.samples_per_s()),
    }
    right = {"training loss": number(history.loss), **_validation(history), **_resources(history)}
    for index in range(max(len(left), len(right))):
        cells = [*_pair(left, index), *_pair(right, index)]
        table.add_row(*cells)
    return table


def _validation(history: History) -> dict[str, str]:
    if not history.validations:
        return {}
    last, best = history.validations[-1], history.best
    metrics = "".join(f", {name} {number(value)}" for name, value in last.metrics.items())
    figures = {"validation": f"loss {number(last.loss)}{metrics}"}
    if best is not None and best.step != last.step:
        figures["best"] = f"{number(best.loss)} at step {best.step}"
    return figures


def _resources(history: History) -> dict[str, str]:
    ranks = sorted(history.ranks.values(), key=lambda rank: rank.rank)
    sent = [rank.bytes_sent for rank in ranks]
    peaks = [rank.peak_memory_bytes for rank in ranks if rank.peak_memory_bytes is not None]
    figures = {"ranks": str(history.world_size or "-")}
    if sent:
        most, least = format_bytes(max(sent)), format_bytes(min(sent))
        figures["sent by a rank"] = most if most == least else f"{least} to {most}"
    if peaks:
        figures["memory of a rank"] = f"up to {format_bytes(max(peaks))}"
    if history.checkpoints:
        figures["checkpoint"] = saved_line(history)
    return figures


def _pair(figures: dict[str, str], index: int) -> tuple[Text, Text]:
    if index >= len(figures):
        return Text(), Text()
    name, value = list(figures.items())[index]
    return Text(name, "bright_black"), Text(value)


def _curve(history: History) -> list[Text]:
    lines = loss_plot(history, _PLOT_COLUMNS, _PLOT_ROWS)
    if lines:
        key = Text(f"{'':>11}").append("⠤⠤ ", "cyan").append("training (smoothed)   ", "bright_black")
        if history.validations:
            key.append("● ", "bold yellow").append("validation", "bright_black")
        lines.append(key)
    return lines


def _bars(history: History) -> list[Text]:
    bars = rank_bars(history, 40, recent=False)
    return [*bars, Text(f"{'':>9}").append_text(legend())] if bars else []


def _layout(history: History) -> list[Text]:
    lines = history.layout_lines()
    return [Text("layout", "bold"), *(Text(f"  {line}") for line in lines)] if lines else []


def _members(history: History) -> list[Text]:
    lines = history.members.lines()
    return [Text("members", "bold"), *(Text(f"  {line}") for line in lines)] if lines else []


def _sample(history: History) -> list[Text]:
    lines = printable(history.sample).split("\n")
    if not history.sample:
        return []
    shown = [Text("│ ", "bright_black").append(line, "default") for line in lines[:_MAX_SAMPLE_LINES]]
    more = [Text(f"{len(lines) - _MAX_SAMPLE_LINES} more lines in the report", "bright_black")]
    return [Text("sample", "bold"), *shown, *(more if len(lines) > _MAX_SAMPLE_LINES else [])]


def _troubles(history: History) -> list[Text]:
    lines = []
    for note in history.warnings[:8]:
        times = f" ({note.count} times)" if note.count > 1 else ""
        lines.append(Text(f"warning: {note.message}{times}", "yellow"))
    for failure in sorted(history.failures, key=lambda failure: failure.symptom)[:8]:
        lines.append(Text(f"error: {failure.source}: {failure.error}: {failure.message}", "red"))
    ended = [] if history.members.views else sorted(history.exit_codes.items())
    return lines + [Text(f"error: {exit_words(rank, code)}", "red") for rank, code in ended if code]


def _paths(run: Run) -> list[Text]:
    places = {"run": run.path, "report": run.report, "picture": run.curve}
    return [
        Text(f"{name:<9}", "bright_black").append(str(path), "default")
        for name, path in places.items()
        if path.exists()
    ]
