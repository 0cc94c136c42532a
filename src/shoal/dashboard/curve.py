"""Making a curve fit to be seen: smoothing, thinning, its range, drawings of it in characters.

Pure functions of plain numbers; a value of None (a loss that was not finite) is left out or leaves a gap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from shoal.dashboard.history import History

Point = tuple[float, float]

_BLOCKS = "▁▂▃▄▅▆▇█"
# The bit of each dot in a braille cell, by (row, column).
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def loss_lines(history: History, *, by_seconds: bool) -> tuple[list[Point], list[Point]]:
    """Return the training loss as points (x, loss), raw and smoothed; x is seconds or steps."""
    raw: list[Point] = []
    smoothed: list[Point] = []
    for point, mean in zip(history.points, smooth([point.loss for point in history.points]), strict=True):
        x = point.seconds if by_seconds else float(point.step)
        if point.loss is not None and mean is not None:
            raw.append((x, point.loss))
            smoothed.append((x, mean))
    return raw, smoothed


def validation_marks(history: History, *, by_seconds: bool) -> list[Point]:
    """Return the validation losses as points (x, loss); x is seconds or steps."""
    return [(v.seconds if by_seconds else float(v.step), v.loss) for v in history.validations if v.loss is not None]


def loss_range(raw: list[Point], marks: list[Point]) -> Point:
    """Return the (low, high) of the loss axis: nearly all of training, and every validation."""
    return value_range([y for _, y in raw], [y for _, y in marks])


def smooth(values: Sequence[float | None], half_life: float | None = None) -> list[float | None]:
    """Return for each value the mean of all, in which weights halve with every `half_life` values of distance.

    It looks both ways, so a falling curve is not drawn late. None stays None and weighs nothing.

    Args:
        values: one a step.
        half_life: in values; None takes a hundredth of their number, at least 1.
    """
    decay = 0.5 ** (1 / (half_life or max(1.0, len(values) / 100)))
    before, after = _decayed_sums(values, decay), _decayed_sums(values[::-1], decay)[::-1]
    return [
        None if value is None else (left[0] + right[0] - value) / (left[1] + right[1] - 1.0)
        for value, left, right in zip(values, before, after, strict=True)
    ]


def _decayed_sums(values: Sequence[float | None], decay: float) -> list[Point]:
    """For each value the decayed sum of those up to it, itself included, and the sum of their weights."""
    total, weight = 0.0, 0.0
    sums: list[Point] = []
    for value in values:
        total, weight = decay * total, decay * weight
        if value is not None:
            total, weight = total + value, weight + 1.0
        sums.append((total, weight))
    return sums


def thin(points: Sequence[Point], limit: int) -> list[Point]:
    """Return at most about `limit` points that look the same when drawn: the extremes of each stretch."""
    if len(points) <= limit:
        return list(points)
    stride = math.ceil(2 * len(points) / limit)
    kept: list[Point] = []
    for start in range(0, len(points), stride):
        stretch = points[start : start + stride]
        low, high = min(stretch, key=_y), max(stretch, key=_y)
        kept.extend(sorted({low, high}))
    return kept


def value_range(drawn: Sequence[float], whole: Sequence[float] = ()) -> tuple[float, float]:
    """Return the (low, high) of an axis that shows 98 % of `drawn` and all of `whole`, with a margin of 4 %.

    The first steps of a training, or one spike, would press everything else into a line.
    """
    ordered = sorted(drawn)
    edge = len(ordered) // 100
    seen = ordered[edge : len(ordered) - edge] + list(whole)
    low, high = min(seen, default=0.0), max(seen, default=1.0)
    margin = 0.04 * (high - low) or 0.5 * abs(high) or 0.5
    return low - margin, high + margin


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers (1, 2 or 5 times a power of ten apart) within [low, high]."""
    rough = (high - low) / max(1, count)
    if not rough > 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def sparkline(values: Sequence[float | None], width: int) -> str:
    """Draw `values` in one line of at most `width` block characters.

    It looks at a bounded number of values, however many there are: the live display draws it often.
    """
    columns = _columns(values, width)
    known = [value for value in columns if value is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if value is None else _BLOCKS[round((value - low) * scale)] for value in columns)


def braille(points: Sequence[Point], size: tuple[int, int], x: Point, y: Point) -> list[str]:
    """Draw a line through `points`, ordered by x, and return its rows, the top one first.

    Args:
        points: those outside the ranges are drawn on the border.
        size: (columns, rows) in characters; each is 2 x 4 dots.
        x: (low, high) of the horizontal axis.
        y: (low, high) of the vertical axis.
    """
    columns, rows = size
    cells = [[0] * columns for _ in range(rows)]
    last: tuple[int, int] | None = None
    for point in points:
        dot = place(point[0], x, 2 * columns), 4 * rows - 1 - place(point[1], y, 4 * rows)
        for column, row in _between(last or dot, dot):
            cells[row // 4][column // 2] |= _DOTS[row % 4][column % 2]
        last = dot
    return ["".join(chr(0x2800 + bits) if bits else " " for bits in row) for row in cells]


def place(value: float, axis: Point, cells: int) -> int:
    """Return in which of `cells` equal cells of `axis` (low, high) the value lies, or the nearest."""
    low, high = axis
    share = (value - low) / (high - low) if high > low else 0.5
    return min(cells - 1, max(0, int(share * cells)))


def apportion(parts: Sequence[float], width: int) -> list[int]:
    """Return whole numbers in proportion to `parts` that add up to `width` (largest remainder first)."""
    total = sum(parts)
    if total <= 0:
        return [0] * len(parts)
    exact = [part * width / total for part in parts]
    cells = [int(share) for share in exact]
    by_remainder = sorted(range(len(parts)), key=lambda index: cells[index] - exact[index])
    for index in by_remainder[: width - sum(cells)]:
        cells[index] += 1
    return cells


def _y(point: Point) -> float:
    return point[1]


def _columns(values: Sequence[float | None], width: int, per_column: int = 8) -> list[float | None]:
    """Mean of each column's share of `values`, judged by at most `per_column` of them."""
    count = min(width, len(values))
    columns: list[float | None] = []
    for index in range(count):
        start, end = index * len(values) // count, (index + 1) * len(values) // count
        stride = max(1, (end - start) // per_column)
        known = [value for value in values[start:end:stride] if value is not None]
        columns.append(sum(known) / len(known) if known else None)
    return columns


def _between(start: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
    """The dots of a straight line, both ends included."""
    across, down = end[0] - start[0], end[1] - start[1]
    steps = max(abs(across), abs(down), 1)
    return [
        (start[0] + round(across * step / steps), start[1] + round(down * step / steps)) for step in range(steps + 1)
    ]
