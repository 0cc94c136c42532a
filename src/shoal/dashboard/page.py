"""The report of a run as one HTML page that needs nothing else: no script, no font, no picture from outside.

`build_page` is a pure function of plain values. All text that comes from a run is escaped.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from shoal.dashboard.curve import Point, apportion, loss_lines, loss_range, validation_marks, value_range
from shoal.dashboard.history import History
from shoal.dashboard.records import Failure, RankHistory, ValidationPoint
from shoal.dashboard.style import CSS
from shoal.dashboard.svg import Axis, Series, line_chart
from shoal.dashboard.terminal import exit_words, number, printable, rate
from shoal.units import format_bytes, format_duration

_MAX_ROWS = 40


@dataclass(frozen=True, kw_only=True)
class PageText:
    """What a page shows beside the history: the run's folder, its plan file's text, its run.json."""

    run: str
    plan: str
    info: dict[str, Any]


def build_page(history: History, text: PageText) -> str:
    """Return the whole page."""
    sections = [
        _head(history, text),
        _section("Errors", _errors(history)) if history.state == "failed" else "",
        _cards(history),
        _section("Loss", _loss_charts(history)),
        _section("Errors that it got over", _errors(history)) if history.state != "failed" else "",
        _section("Warnings", _warnings(history)),
        _section("Sample", f"<pre>{escape(printable(history.sample))}</pre>" if history.sample else ""),
        _section("Where the time went", _time_bars(history)),
        _section("Members", "".join(f"<p>{escape(line)}</p>" for line in history.members.lines())),
        _section("Layout", "".join(f"<p>{escape(line)}</p>" for line in history.layout_lines())),
        _section("Throughput and traffic", _traffic(history)),
        _section("Validations", _validations(history)),
        _section("Checkpoints", _checkpoints(history)),
        _section("Plan", f"<pre>{escape(text.plan)}</pre>" if text.plan else ""),
        _section("Versions and arguments", _facts(history, text)),
    ]
    title = escape(f"{history.title or text.run} - Shoal")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{CSS}</style></head>\n<body>{''.join(sections)}</body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>\n" if body else ""


def _head(history: History, text: PageText) -> str:
    words = {
        "finished": f"finished: {history.reason}",
        "failed": "failed",
        "unfinished": "no end was recorded",
        "empty": "no step was taken",
    }
    chip = f'<span class="chip {history.state}">{escape(words[history.state])}</span>'
    began = history.started_t
    # UTC, so that a page read elsewhere says the same.
    when = "" if began is None else time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(began))
    resumed = [f"resumed at step {step}" for step in history.resumed_at]
    sub = " · ".join(escape(word) for word in (text.run, when, *resumed) if word)
    return f'<header><h1>{escape(history.title or "Run")} {chip}</h1><p class="sub">{sub}</p></header>\n'


def _cards(history: History) -> str:
    step_s, best = history.step_s_median(), history.best
    sent = sum(rank.bytes_sent for rank in history.ranks.values())
    peaks = [rank.peak_memory_bytes for rank in history.ranks.values() if rank.peak_memory_bytes is not None]
    figures = {
        "best validation loss": number(best.loss) if best else "-",
        "training loss": number(history.loss),
        "steps": f"{history.step:,}",
        "training time": format_duration(history.seconds),
        "samples per second": rate(history.samples_per_s()),
        "median step": "-" if step_s is None else format_duration(step_s),
        "samples": f"{history.samples:,}",
        "ranks": str(history.world_size or "-"),
        "sent by all ranks": format_bytes(sent),
        "most memory of a rank": format_bytes(max(peaks)) if peaks else "-",
    }
    cards = (f'<div class="card"><b>{escape(b)}</b><span>{a}</span></div>' for a, b in figures.items())
    return f'<div class="cards">{"".join(cards)}</div>\n'


def _loss_charts(history: History) -> str:
    charts = [_loss_chart(history, by_seconds=by_seconds) for by_seconds in (False, True)]
    if not any(charts):
        return "<p>No loss was recorded.</p>"
    keys = ['<i class="training"></i>training, faint: each step']
    if history.validations:
        keys.append('<i class="validation"></i>validation')
    best = history.best
    if best is not None:
        keys.append(f'<i class="ring"></i>best: {number(best.loss)} at step {best.step}')
    return f'<div class="charts">{"".join(charts)}</div>{_legend(keys)}'


def _legend(keys: Iterable[str]) -> str:
    return f'<div class="legend">{"".join(f"<span>{key}</span>" for key in keys)}</div>'


def _loss_chart(history: History, *, by_seconds: bool) -> str:
    raw, smoothed = loss_lines(history, by_seconds=by_seconds)
    marks = validation_marks(history, by_seconds=by_seconds)
    if not raw and not marks:
        return ""
    best = history.best
    ring = [] if best is None or best.loss is None else [(best.seconds if by_seconds else best.step, best.loss)]
    labels = [f"step {v.step}: {number(v.loss)}" for v in history.validations if v.loss is not None]
    series = [
        Series(points=raw, style="raw"),
        Series(points=smoothed, style="line"),
        Series(points=marks, style="join"),
        Series(points=marks, style="dots", dots=True, labels=labels),
        Series(points=ring, style="best", dots=True),
    ]
    x = _x_axis(raw + marks, "seconds of training" if by_seconds else "steps")
    low, high = loss_range(raw, marks)
    return line_chart(series, x, Axis(title="loss", low=low, high=high), name=f"loss-{int(by_seconds)}")


def _x_axis(points: Sequence[Point], title: str) -> Axis:
    across = [x for x, _ in points]
    return Axis(title=title, low=min(across) if title == "steps" else 0.0, high=max(across))


def _time_bars(history: History) -> str:
    ranks = [rank for _, rank in sorted(history.ranks.items()) if rank.total.total_s > 0]
    if not ranks:
        return ""
    longest = max(rank.total.total_s for rank in ranks)
    keys = (f'<i class="{part}"></i>{part}' for part in ranks[0].total.parts())
    return "".join(_time_bar(rank, longest) for rank in ranks) + _legend(keys)


def _time_bar(rank: RankHistory, longest: float) -> str:
    total_s, parts = rank.total.total_s, rank.total.parts()
    shares = apportion(list(parts.values()), 1000)
    pieces = "".join(
        f'<i class="{name}" style="width:{share / 10:g}%" title="{name}: {format_duration(parts[name])}">'
        f"{f'{share / 10:.0f} %' if share >= 60 else ''}</i>"
        for name, share in zip(parts, shares, strict=True)
        if share
    )
    bar = f'<div class="bar" style="width:{100 * total_s / longest:.1f}%">{pieces}</div>'
    return _row(_rank_name(rank), bar, format_duration(total_s))


def _rank_name(rank: RankHistory) -> str:
    return f"rank {rank.rank} <small>{escape(' '.join(word for word in (rank.node, rank.device) if word))}</small>"


def _row(name: str, bar: str, value: str) -> str:
    return f'<div class="row"><span>{name}</span><div>{bar}</div><span>{escape(value)}</span></div>'


def _traffic(history: History) -> str:
    points = [(p.seconds, p.step_samples / p.step_s) for p in history.points if p.step_s > 0]
    if not points:
        return ""
    high = value_range([y for _, y in points])[1]
    line = _running_median(points, max(2, len(points) // 60))
    series = [Series(points=points, style="raw"), Series(points=line, style="line")]
    y = Axis(title="samples per second", low=0.0, high=high)
    chart = line_chart(series, _x_axis(points, "seconds of training"), y, name="throughput")
    return f'<div class="charts">{chart}<div>{_sent_bars(history)}</div></div>'


def _running_median(points: Sequence[Point], width: int) -> list[Point]:
    """The median of each point and the `width` on either side of it."""
    medians = []
    for index, (x, _) in enumerate(points):
        around = sorted(y for _, y in points[max(0, index - width) : index + width + 1])
        medians.append((x, around[len(around) // 2]))
    return medians


def _sent_bars(history: History) -> str:
    most = max((rank.bytes_sent for rank in history.ranks.values()), default=0)
    rows = []
    for _, rank in sorted(history.ranks.items()):
        width = 100 * rank.bytes_sent / most if most else 0
        bar = f'<div class="bar"><i class="compute" style="width:{width:.1f}%"></i></div>'
        rows.append(_row(_rank_name(rank), bar, format_bytes(rank.bytes_sent)))
    return '<p class="legend">Sent by each rank, on the wire</p>' + "".join(rows)


def _validations(history: History) -> str:
    if not history.validations:
        return ""
    names = sorted({name for point in history.validations for name in point.metrics})
    best, rows = history.best, []
    for point in _spread(history.validations):
        cells = [str(point.step), format_duration(point.seconds), number(point.loss)]
        cells += [number(point.metrics.get(name)) for name in names]
        rows.append(_cells("td", cells, "best" if best is not None and point.step == best.step else ""))
    return _table(["step", "after", "loss", *names], rows, len(history.validations))


def _checkpoints(history: History) -> str:
    rows = []
    for saved in history.checkpoints[-_MAX_ROWS:]:
        durations = format_duration(saved.stall_s), format_duration(saved.write_s)
        rows.append(_cells("td", [str(saved.step), saved.path, format_bytes(saved.size_bytes), *durations]))
    headings = ["step", "folder", "size", "training stood still", "written in"]
    return _table(headings, rows, len(history.checkpoints)) if rows else ""


def _spread(items: list[ValidationPoint]) -> list[ValidationPoint]:
    """At most `_MAX_ROWS` of `items`, evenly, the last among them."""
    stride = -(-len(items) // _MAX_ROWS)
    return items[::-1][::stride][::-1] if stride > 1 else items


def _table(headings: list[str], rows: list[str], total: int) -> str:
    table = f'<div class="scroll"><table>{_cells("th", headings)}{"".join(rows)}</table></div>'
    return table + (f'<p class="sub">{len(rows)} of {total} shown.</p>' if len(rows) < total else "")


def _cells(tag: str, cells: list[str], style: str = "") -> str:
    inside = "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells)
    return f'<tr class="{style}">{inside}</tr>' if style else f"<tr>{inside}</tr>"


def _warnings(history: History) -> str:
    if not history.warnings:
        return ""
    items = []
    for note in history.warnings[:_MAX_ROWS]:
        times = f", {note.count} times" if note.count > 1 else ""
        where = f"{note.source}, after {format_duration(note.seconds)}{times}"
        items.append(f"<li>{escape(note.message)} <small>({escape(where)})</small></li>")
    return f'<ul class="notes">{"".join(items)}</ul>'


def _errors(history: History) -> str:
    # What went wrong comes before what followed from it.
    causes_first = sorted(history.failures, key=lambda failure: failure.symptom)
    exits = [
        f'<div class="error">{exit_words(rank, code)}</div>'
        for rank, code in sorted(history.exit_codes.items())
        if code
    ]
    return "".join([*(_error(failure) for failure in causes_first), *exits])


def _error(failure: Failure) -> str:
    where = failure.source + ("" if failure.step is None else f", step {failure.step}")
    what = ", which followed from another rank's failure" if failure.symptom else ""
    trace = f"<details><summary>traceback</summary><pre>{escape(failure.traceback)}</pre></details>"
    return (
        f'<div class="error"><b>{escape(failure.error)}</b> {escape(failure.message)} '
        f"<small>({escape(where)}{what})</small>{trace if failure.traceback else ''}</div>"
    )


def _facts(history: History, text: PageText) -> str:
    named = ("plan_hash", "job", "arguments", "num_parameters", "torch", "shoal", "stop")
    facts = {**text.info, **{name: history.started[name] for name in named if name in history.started}}
    return f"<pre>{escape(chr(10).join(f'{name}: {value}' for name, value in facts.items()))}</pre>"
