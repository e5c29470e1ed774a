"""The points as a table, a plot and JSON's data."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, ScalarFormatter
from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks.search_frontier.choosing import Point
from benchmarks.search_frontier.sampling import GUIDED, REFERENCE

Gains = Sequence[tuple[Point, tuple[float, float]]]
"""Points, and what each has above the guided policy's plain samples at as many tokens, with its standard error."""
STYLES = {"majority": ":", "weighted": "-", "value": "--", "sample": "-."}
COLOURS = {REFERENCE: "#8a94a0", GUIDED: "#2b6cb0"}
OTHERS = ("#c05621", "#2f855a", "#6b46c1", "#b83280", "#00838f")


def table(rows: Gains) -> Table:
    """A row for each point; a single sample stands once for each method."""
    made = Table(box=SIMPLE_HEAD)
    for title in ("samples", "n", "chosen by", "tokens", "accuracy", "above guided at as many tokens", "answers"):
        made.add_column(title, justify="left" if title in ("samples", "chosen by") else "right")
    for point, (more, error) in rows:
        if point.samples == 1 and point.rule != "value":
            continue
        mean, se = point.accuracy
        made.add_row(
            point.method,
            str(point.samples),
            "–" if point.samples == 1 else point.rule,
            f"{point.tokens:.0f}",
            f"{100 * mean:.1f} ± {100 * se:.1f} %",
            "" if point.method == GUIDED else f"{100 * more:+.1f} ± {100 * error:.1f}",
            f"{point.answers:,}",
        )
    return made


def data(rows: Gains) -> list[dict[str, Any]]:
    """Every point's figures."""
    return [
        {
            "method": point.method, "rule": point.rule, "samples": point.samples, "tokens": point.tokens,
            "accuracy": point.accuracy[0], "accuracy_se": point.accuracy[1], "gain": more, "gain_se": error,
            "problems": len(point.rewards), "answers": point.answers,
        }
        for point, (more, error) in rows
    ]  # fmt: skip


def plot(path: Path, points: Sequence[Point]) -> None:
    """Accuracy against tokens, a line for each method and rule; bars are one standard error."""
    figure = Figure(figsize=(8.2, 5), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    draw(axes, points)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path)


def draw(axes: Axes, points: Sequence[Point]) -> None:
    """Draws what `plot` draws into existing axes, without a legend."""
    colours = colours_of(points)
    for method, rule in dict.fromkeys((point.method, point.rule) for point in points):
        line = sorted(
            (point for point in points if (point.method, point.rule) == (method, rule)), key=lambda point: point.tokens
        )
        axes.errorbar(
            [point.tokens for point in line], [point.accuracy[0] for point in line],
            yerr=[point.accuracy[1] for point in line], linestyle=STYLES[rule], color=colours[method], marker="o",
            markersize=4, capsize=2.5, linewidth=1.5, label=f"{method}, by {rule}",
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("generated tokens per answer")
    of_accuracy(axes)


def colours_of(points: Sequence[Point]) -> dict[str, str]:
    """A colour for each method."""
    spare = iter(OTHERS * len(points))
    return {method: COLOURS.get(method) or next(spare) for method in dict.fromkeys(point.method for point in points)}


def of_accuracy(axes: Axes) -> None:
    """Makes the upward axis one of accuracy."""
    axes.set_ylabel("accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e9ec", linewidth=0.8)
