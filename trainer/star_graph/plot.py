"""`report.png`: accuracy against KL, with the least KL that it could have, and accuracy over eta."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

from trainer.evaluate import REFERENCE
from trainer.evaluate_plot import COLOURS, GREY, NAMES, write_etas
from trainer.star_graph.report import least_kl


def plot(path: Path, report: dict[str, Any]) -> None:
    """Writes it; bars are one standard error."""
    figure = Figure(figsize=(10.4, 4.4), dpi=140, layout="constrained")
    left, _ = _panels(figure, report)  # no KL is far above ln d
    if 0 < report["reference"] < 1:
        accuracies = np.linspace(report["reference"], 1.0, 200)
        least = [least_kl(float(a), report["reference"]) for a in accuracies]
        left.plot(least, accuracies, color=GREY, linewidth=1.2, linestyle=":", label="least KL for an accuracy")
    left.axvline(report["least_kl"], color=GREY, linewidth=0.8, label=f"ln {1 / report['shortcut']:.0f}")
    left.set_xlim(0, 1.08 * max(report["least_kl"], *(r["kl"] for r in report["results"])))
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    best = report["best"]
    count = report["results"][0]["problems"]
    shown = f": {100 * best['accuracy']:.1f} % at η = {best['eta']:g}" if best else ""
    figure.suptitle(f"Star-Graph {report['graph']}, {count} held-out graphs{shown}", fontsize=11)
    figure.savefig(path)


def _panels(figure: Figure, report: dict[str, Any]) -> tuple[Axes, Axes]:
    """Accuracy against KL, and over eta, of a report's `results`; without legend and title."""
    left, right = figure.subplots(1, 2, sharey=True)
    reference = next(r for r in report["results"] if r["method"] == REFERENCE)
    _curves(left, report, lambda r: r["kl"], lambda r: r["kl_se"])
    # A little apart, so that one's bars do not hide the other's.
    _curves(right, report, lambda r: r["eta"] * (1.02 if r["method"] == "cd" else 0.98), lambda r: 0.0)
    for axes in (left, right):
        level, error = reference["accuracy"], reference["accuracy_se"]
        axes.axhspan(level - error, level + error, color=GREY, alpha=0.2, linewidth=0)
        axes.axhline(level, color=GREY, linewidth=1.2, linestyle="--", label="reference")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e9ec", linewidth=0.8)
        axes.set_axisbelow(True)
    left.set(xlabel="KL to the reference per completion, nats (numbers: η)", ylabel="accuracy (pass@1)")
    left.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    left.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    etas = sorted({r["eta"] for r in report["results"] if r["eta"] is not None})
    right.set_xscale("log")
    right.xaxis.set_major_locator(FixedLocator(etas))
    right.xaxis.set_minor_locator(NullLocator())
    right.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    right.set(xlabel="η (smaller is stronger)")
    right.invert_xaxis()
    write_etas(left, [(r, COLOURS[r["method"]]) for r in report["results"] if r["method"] != REFERENCE], "{:g}")
    return left, right


def _curves(
    axes: Axes, report: dict[str, Any], x: Callable[[dict[str, Any]], float], x_error: Callable[[dict[str, Any]], float]
) -> None:
    for method, colour in COLOURS.items():
        points = sorted((r for r in report["results"] if r["method"] == method), key=lambda r: -r["eta"])
        axes.errorbar(
            [x(r) for r in points], [r["accuracy"] for r in points],
            xerr=[x_error(r) for r in points], yerr=[r["accuracy_se"] for r in points],
            color=colour, marker="o", markersize=5, capsize=2.5, linewidth=1.6, elinewidth=1, label=NAMES[method],
        )  # fmt: skip
