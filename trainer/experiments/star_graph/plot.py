"""`report.png`: accuracy against KL, beside the least KL that an accuracy can have, and accuracy over eta."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

from trainer.evaluation.labels import write_etas
from trainer.evaluation.plot import COLOURS, GREY, by_strength
from trainer.evaluation.report import SettingReport
from trainer.evaluation.table import NAMES
from trainer.experiments.star_graph.report import StarGraphOutcome, least_kl


def plot(path: Path, outcome: StarGraphOutcome) -> None:
    """Writes the PNG; bars are one standard error."""
    figure = Figure(figsize=(10.4, 4.4), dpi=140, layout="constrained")
    left, _ = _panels(figure, outcome.results)  # no KL is far above ln d
    if 0 < outcome.reference < 1:
        accuracies = np.linspace(outcome.reference, 1.0, 200)
        least = [least_kl(float(a), outcome.reference) for a in accuracies]
        left.plot(least, accuracies, color=GREY, linewidth=1.2, linestyle=":", label="least KL for an accuracy")
    left.axvline(outcome.least_kl, color=GREY, linewidth=0.8, label=f"ln {1 / outcome.shortcut:.0f}")
    left.set_xlim(0, 1.08 * max(outcome.least_kl, *(r.kl or 0.0 for r in outcome.results)))
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    best = outcome.best
    result = f": {100 * best.accuracy:.1f} % at η = {best.eta:g}" if best else ""
    problems = outcome.results[0].problems
    figure.suptitle(f"Star-Graph {outcome.graph}, {problems} held-out graphs{result}", fontsize=11)
    figure.savefig(path)


def _panels(figure: Figure, results: list[SettingReport]) -> tuple[Axes, Axes]:
    """Draws accuracy against KL, and over eta, without legend and title; the first result is the reference's."""
    left, right = figure.subplots(1, 2, sharey=True)
    _curves(left, results, lambda r: r.point[0], lambda r: r.kl_se or 0.0)
    # A little apart, so that one's bars do not hide the other's.
    _curves(right, results, lambda r: (r.eta or 0.0) * (1.02 if r.method == "cd" else 0.98), lambda r: 0.0)
    for axes in (left, right):
        level, error = results[0].accuracy or 0.0, results[0].accuracy_se or 0.0
        axes.axhspan(level - error, level + error, color=GREY, alpha=0.2, linewidth=0)
        axes.axhline(level, color=GREY, linewidth=1.2, linestyle="--", label="reference")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e9ec", linewidth=0.8)
        axes.set_axisbelow(True)
    left.set(xlabel="KL to the reference per completion, nats (numbers: η)", ylabel="accuracy (pass@1)")
    left.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    left.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    etas = sorted({r.eta for r in results if r.eta is not None})
    right.set_xscale("log")
    right.xaxis.set_major_locator(FixedLocator(etas))
    right.xaxis.set_minor_locator(NullLocator())
    right.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    right.set(xlabel="η (smaller is stronger)")
    right.invert_xaxis()
    write_etas(left, [(r, COLOURS[r.method]) for r in results if r.guided], "{:g}")
    return left, right


def _curves(
    axes: Axes,
    results: list[SettingReport],
    x: Callable[[SettingReport], float],
    x_error: Callable[[SettingReport], float],
) -> None:
    for method, colour in COLOURS.items():
        points = by_strength(r for r in results if r.method == method)
        axes.errorbar(
            [x(r) for r in points], [r.point[1] for r in points],
            xerr=[x_error(r) for r in points], yerr=[r.accuracy_se or 0.0 for r in points],
            color=colour, marker="o", markersize=5, capsize=2.5, linewidth=1.6, elinewidth=1, label=NAMES[method],
        )  # fmt: skip
