"""Labels of a plot's points, each where it covers the least."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from trainer.evaluation.report import SettingReport

SIZE = 8  # points
AROUND = ((1, -1), (1, 1), (-1, -1), (-1, 1), (0, 1), (0, -1), (1, 0), (-1, 0))
"""Where a label may stand, the preferred places first."""
GAP = 7.0
"""Pixels between a point and its label."""
OUTSIDE = 1000.0
"""What a pixel of a label beyond the axes costs, where one that covers something costs 1."""

Pixels = NDArray[np.float64]
Labelled = tuple[SettingReport, str]


def write_etas(axes: Axes, points: Iterable[Labelled], form: str) -> None:
    """Writes each point's eta, or its budget, beside it, in its colour.

    Args:
        axes: their limits must be final; everything else must be drawn.
        points: settings with their colours; those of one colour are joined by a curve, in this order.
        form: format string of an eta.
    """
    labelled = list(points)
    axes.autoscale_view()  # else limits wait for the drawing
    axes.get_figure(root=True).draw_without_rendering()  # type: ignore[union-attr]  # and the layout, too
    taken = np.concatenate([np.empty((0, 2)), *_drawn(axes, labelled)])
    dots = axes.get_figure(root=True).dpi / 72  # type: ignore[union-attr]
    for r, colour in labelled:
        text = r.budget or form.format(r.eta)
        size = np.array([0.62 * SIZE * len(text), 1.25 * SIZE]) * dots
        point = axes.transData.transform(r.point)
        low = min(
            (_corner(point, size, np.array(side), dots) for side in AROUND),
            key=lambda corner: _cost(axes, corner, corner + size, taken),
        )
        axes.annotate(
            text, r.point, textcoords="offset points", xytext=tuple((low - point) / dots), fontsize=SIZE, color=colour,
            va="bottom", path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )  # fmt: skip
        taken = np.concatenate([taken, _filled(low, low + size)])


def _drawn(axes: Axes, points: Sequence[Labelled]) -> Iterator[Pixels]:
    """Pixels along the points' bars and the curves that join them, each `[N, 2]`."""
    before: dict[str, Pixels] = {}
    for r, colour in points:
        (x, y), at = r.point, axes.transData.transform(r.point)
        for bar in ((r.kl_se or 0.0, 0.0), (0.0, r.accuracy_se or 0.0)):
            ends = axes.transData.transform([(x - bar[0], y - bar[1]), (x + bar[0], y + bar[1])])
            yield _line(ends[0], ends[1])
        yield _filled(at - 5, at + 5)
        if colour in before:
            yield _line(before[colour], at)
        before[colour] = at


def _line(start: Pixels, end: Pixels) -> Pixels:
    steps = max(int(np.abs(end - start).max() / 2), 1)
    return start + (end - start) * np.linspace(0, 1, steps + 1)[:, None]


def _filled(low: Pixels, high: Pixels) -> Pixels:
    """Pixels of a rectangle, every third of them."""
    grid = np.meshgrid(np.arange(low[0], high[0], 3.0), np.arange(low[1], high[1], 3.0))
    return np.stack([one.ravel() for one in grid], axis=1)


def _corner(point: Pixels, size: Pixels, side: NDArray[np.int64], dots: float) -> Pixels:
    """The lower left corner of a label on one side of a point."""
    centre = point + side * (size / 2 + GAP * dots / 2)
    return centre - size / 2


def _cost(axes: Axes, low: Pixels, high: Pixels, taken: Pixels) -> float:
    inside = ((taken > low) & (taken < high)).all(axis=1).sum()
    box = axes.get_window_extent()
    beyond = max(box.x0 - low[0], 0) + max(high[0] - box.x1, 0) + max(box.y0 - low[1], 0) + max(high[1] - box.y1, 0)
    return float(inside + OUTSIDE * beyond)
