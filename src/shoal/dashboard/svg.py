"""Line charts as inline SVG: no script, no outside file, and colours from the page's style sheet.

The page styles the classes `grid`, `axis`, `tick`, `raw`, `line`, `join`, `dots` and `best`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from shoal.dashboard.curve import Point, thin, ticks

_WIDTH, _HEIGHT = 560, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 12, 40
_MAX_POINTS = 1200


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line or set of dots: `style` is its class; `labels`, if any, are shown when a dot is pointed at."""

    points: Sequence[Point]
    style: str
    dots: bool = False
    labels: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What is measured along one side, from `low` to `high`."""

    title: str
    low: float
    high: float

    def share(self, value: float) -> float:
        """Where `value` lies: 0 at `low`, 1 at `high`."""
        return (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5


def line_chart(series: Sequence[Series], x: Axis, y: Axis, *, name: str) -> str:
    """Return an `<svg>` of the series, drawn in their order; what lies outside the axes is cut off.

    Args:
        series: from back to front.
        x: the horizontal axis.
        y: the vertical axis.
        name: unique within the page, letters and dashes only.
    """
    # Wider than the axis by a dot's radius, or the last validation is cut in half.
    inside = f'x="{_LEFT - 7}" y="{_TOP}" width="{_WIDTH - _LEFT - _RIGHT + 14}" height="{_HEIGHT - _TOP - _BOTTOM}"'
    body = "".join(_series(one, x, y) for one in series)
    title = escape(f"{y.title} over {x.title}")
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{title}">'
        f'<clipPath id="{name}"><rect {inside}/></clipPath>{_axes(x, y)}<g clip-path="url(#{name})">{body}</g></svg>'
    )


def tick_label(value: float) -> str:
    """`20000.0` -> `20k`; `0.30000000000000004` -> `0.3`."""
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * factor:
            return f"{value / factor:.5g}{suffix}"
    return f"{value:.5g}" if abs(value) > 1e-12 else "0"


def _place(point: Point, x: Axis, y: Axis) -> tuple[float, float]:
    across = _LEFT + x.share(point[0]) * (_WIDTH - _LEFT - _RIGHT)
    down = _HEIGHT - _BOTTOM - y.share(point[1]) * (_HEIGHT - _TOP - _BOTTOM)
    # Far outside is as good as infinitely far, and some viewers refuse huge numbers.
    return across, min(10.0 * _HEIGHT, max(-9.0 * _HEIGHT, down))


def _series(series: Series, x: Axis, y: Axis) -> str:
    if not series.points:
        return ""
    # A line of one point could not be seen.
    if series.dots or len(series.points) == 1:
        return "".join(_dot(series, index, x, y) for index in range(len(series.points)))
    placed = (_place(point, x, y) for point in thin(series.points, _MAX_POINTS))
    path = "L".join(f"{across:.1f} {down:.1f}" for across, down in placed)
    return f'<path class="{series.style}" d="M{path}"/>'


def _dot(series: Series, index: int, x: Axis, y: Axis) -> str:
    across, down = _place(series.points[index], x, y)
    label = f"<title>{escape(series.labels[index])}</title>" if series.labels else ""
    radius = 6 if series.style == "best" else 3.5
    return f'<circle class="{series.style}" cx="{across:.1f}" cy="{down:.1f}" r="{radius}">{label}</circle>'


def _axes(x: Axis, y: Axis) -> str:
    right, base = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    lines = []
    for value in ticks(y.low, y.high):
        down = _place((x.low, value), x, y)[1]
        lines.append(f'<path class="grid" d="M{_LEFT} {down:.1f}H{right}"/>')
        lines.append(f'<text class="tick end" x="{_LEFT - 7}" y="{down + 4:.1f}">{tick_label(value)}</text>')
    for value in ticks(x.low, x.high, 6):
        across = _place((value, y.low), x, y)[0]
        lines.append(f'<text class="tick mid" x="{across:.1f}" y="{base + 16}">{tick_label(value)}</text>')
    lines.append(f'<path class="axis" d="M{_LEFT} {base}H{right}"/>')
    middle, centre = (_LEFT + right) / 2, (_TOP + base) / 2
    lines.append(f'<text class="tick mid" x="{middle}" y="{_HEIGHT - 6}">{escape(x.title)}</text>')
    turned = f'transform="rotate(-90 12 {centre})" x="12" y="{centre}"'
    lines.append(f'<text class="tick mid" {turned}>{escape(y.title)}</text>')
    return "".join(lines)
