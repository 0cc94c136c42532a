"""The loss curve as a picture, drawn by matplotlib without a display and without its global state."""

from __future__ import annotations

import io

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from shoal.dashboard.curve import loss_lines, loss_range, thin, validation_marks
from shoal.dashboard.history import History

_TRAIN, _VALIDATION, _BEST, _GREY = "#1f77b4", "#d55e00", "#009e73", "#666666"
_MAX_POINTS = 2000


def draw_loss(history: History) -> bytes:
    """Return a PNG of 1500 x 600 pixels: training and validation loss over steps and over seconds."""
    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    figure.suptitle(_title(history), fontsize=11)
    _draw(by_step, history, by_seconds=False)
    _draw(by_time, history, by_seconds=True)
    by_step.set_ylabel("loss")
    if by_step.get_legend_handles_labels()[0]:
        by_step.legend(frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _title(history: History) -> str:
    ranks = "1 rank" if history.world_size == 1 else f"{history.world_size} ranks"
    # A dollar sign in a name would be read as mathematics.
    return f"{history.title or 'run'}, {ranks}".replace("$", r"\$")


def _draw(axes: Axes, history: History, *, by_seconds: bool) -> None:
    raw, smoothed = loss_lines(history, by_seconds=by_seconds)
    marks = validation_marks(history, by_seconds=by_seconds)
    dot = "o" if len(raw) == 1 else None  # a line of one point cannot be seen
    if raw:
        axes.plot(*zip(*thin(raw, _MAX_POINTS), strict=True), color=_TRAIN, alpha=0.25, linewidth=0.8)
        axes.plot(
            *zip(*thin(smoothed, _MAX_POINTS), strict=True), color=_TRAIN, linewidth=1.6, marker=dot, label="training"
        )
    if marks:
        axes.plot(*zip(*marks, strict=True), "o-", color=_VALIDATION, markersize=4, label="validation")
    best = history.best
    if best is not None and best.loss is not None:
        x = best.seconds if by_seconds else best.step
        axes.plot([x], [best.loss], "*", color=_BEST, markersize=13, label=f"best: {best.loss:.4g}", zorder=5)
    if raw or marks:
        axes.set_ylim(*loss_range(raw, marks))
    else:
        axes.text(0.5, 0.5, "no loss was recorded", ha="center", transform=axes.transAxes, color=_GREY)
    axes.set_xlabel("seconds of training" if by_seconds else "steps")
    axes.grid(visible=True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
