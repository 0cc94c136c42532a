"""Validation loss of several trainings in one picture, against seconds or against what each rank sent."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from record import Point

# Told apart by those who see few colours too (Okabe and Ito); the first is the base line's.
_COLOURS = ["#555555", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"]
_MARKERS = "osD^vPX*"
_AXES = {"seconds": "seconds of training", "megabytes": "megabytes sent by a rank"}


def draw(title: str, curves: Mapping[str, Sequence[Point]], x: str) -> bytes:
    """Return an SVG of validation loss over `x` ("seconds" or "megabytes"), which has a logarithmic axis."""
    # The same curves give the same file: no date, and no random names inside.
    with matplotlib.rc_context({"svg.hashsalt": "shoal"}):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        for index, (name, points) in enumerate(curves.items()):
            drawn = [(getattr(point, x), point.loss) for point in points if getattr(point, x) > 0]
            style = {"color": _COLOURS[index % len(_COLOURS)], "marker": _MARKERS[index % len(_MARKERS)]}
            if drawn:
                axes.plot(*zip(*drawn, strict=True), markersize=4, linewidth=1.6, label=name, **style)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(LogFormatter())
        axes.xaxis.set_minor_formatter(LogFormatter())
        axes.set_xlabel(_AXES[x])
        axes.set_ylabel("validation loss")
        axes.set_title(title, fontsize=11)
        axes.grid(visible=True, which="both", alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=9)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def write(name: str, title: str, curves: Mapping[str, Sequence[Point]], folders: Sequence[Path]) -> list[Path]:
    """Write `NAME-seconds.svg` and `NAME-megabytes.svg` into each folder and return their paths."""
    paths: list[Path] = []
    for x in _AXES:
        picture = draw(title, curves, x)
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{name}-{x}.svg"
            path.write_bytes(picture)
            paths.append(path)
    return paths
