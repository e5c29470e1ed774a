"""The calibration plot: whether what the critic expects comes true, and from where in a completion on it knows."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from trainer.training.heldout import Predictions
from trainer.training.reliability import reliability
from trainer.training.report import HeldOutReport, Measures

BLUE, GREY, ORANGE = "#2b6cb0", "#8a94a0", "#c05621"


def calibration(
    path: Path, predictions: Predictions, report: HeldOutReport, title: str, bounds: tuple[float, float]
) -> None:
    """Writes a PNG: a reliability diagram above a histogram of predictions; AUC and log-loss by position beside them.

    Args:
        path: of the file.
        predictions: the critic's, on held-out rollouts.
        report: their measures.
        title: of the figure.
        bounds: least and greatest reward.
    """
    figure = Figure(figsize=(10.5, 5.4), dpi=130, layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=[3.2, 1], width_ratios=[1.15, 1])
    _reliability(figure, grid, predictions, report.overall, bounds)
    _positions(figure, grid, report)
    figure.suptitle(title, fontweight="bold", fontsize=12)
    figure.savefig(path)


def _reliability(
    figure: Figure, grid: Any, predictions: Predictions, overall: Measures, bounds: tuple[float, float]
) -> None:
    axes = figure.add_subplot(grid[0, 0])
    axes.plot(bounds, bounds, color=GREY, linewidth=1, linestyle="--", label="perfectly calibrated")
    bins = reliability(predictions)
    axes.errorbar(
        [b.predicted for b in bins], [b.earned for b in bins], yerr=[1.96 * b.error for b in bins], color=BLUE,
        marker="o", markersize=5, linewidth=1.5, capsize=2.5, label="critic, tenths of the predictions (95 %)",
    )  # fmt: skip
    axes.set(ylabel="mean reward earned", xlim=bounds, title="Does it come true?")
    auc = "–" if overall.auc is None else f"{overall.auc:.3f}"
    axes.text(
        0.97, 0.05,
        f"Brier {overall.brier:.4f}  (constant {overall.brier_constant:.4f})\n"
        f"AUC {auc}    ECE {overall.ece:.4f}\n"
        f"{overall.rollouts:,} rollouts, {overall.n:,} positions",
        transform=axes.transAxes, ha="right", va="bottom", fontsize=8.5, color="#333333",
    )  # fmt: skip
    axes.legend(loc="upper left", frameon=False, fontsize=8.5)
    below = figure.add_subplot(grid[1, 0], sharex=axes)
    below.hist(
        predictions.predicted,
        bins=40,
        range=bounds,
        weights=predictions.weights / predictions.weights.sum(),
        color=BLUE,
        alpha=0.55,
    )
    below.set(xlabel="expected reward E[Z]", ylabel="share")
    axes.tick_params(labelbottom=False)
    for a in (axes, below):
        tidy(a)


def _positions(figure: Figure, grid: Any, report: HeldOutReport) -> None:
    entries: list[tuple[str, Measures]] = [
        (measures.part.removesuffix("%"), measures) for measures in report.by_position
    ]
    entries.append(("last\ntoken", report.last_token))
    x = np.arange(len(entries))
    axes = figure.add_subplot(grid[0, 1])
    auc = [np.nan if measures.auc is None else measures.auc for _, measures in entries]
    axes.plot(x, auc, color=BLUE, marker="o", markersize=5, linewidth=1.5)
    axes.axhline(0.5, color=GREY, linewidth=1, linestyle="--")
    axes.text(x[0], 0.505, "chance", color=GREY, fontsize=8.5, va="bottom")
    axes.set(ylabel="AUC", ylim=(min(0.45, np.nanmin([*auc, 0.5]) - 0.03), 1.01), title="From where on does it know?")
    below = figure.add_subplot(grid[1, 1], sharex=axes)
    below.bar(x, [measures.log_loss for _, measures in entries], color=ORANGE, alpha=0.7, width=0.6)
    below.set(ylabel="log-loss", xlabel="position in the completion")
    below.set_xticks(x, [part for part, _ in entries], fontsize=8.5)
    below.set_xlabel("position in the completion, %")
    axes.tick_params(labelbottom=False)
    for a in (axes, below):
        tidy(a)


def tidy(axes: Any) -> None:
    """Takes away what a plot does not need."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e9ec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.title.set_fontsize(10)
