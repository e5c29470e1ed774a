"""An evaluation's report as a plot of accuracy against KL."""

import math
import statistics
from collections.abc import Iterable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, SymmetricalLogLocator

from trainer.evaluation.labels import write_etas
from trainer.evaluation.report import EvaluationReport, SettingReport
from trainer.evaluation.table import NAMES

COLOURS = {"qsharp": "#2b6cb0", "cd": "#c05621"}
OTHERS = ("#2f855a", "#6b46c1", "#b83280", "#00838f")
GREY = "#8a94a0"
CROWDED = 10  # times the median
# What else one can do with k samples of the reference, drawn as levels.
LEVELS = {
    "majority": ("majority of {}", ":"),
    "weighted_majority": ("weighted majority of {}", "-."),
    "best_of": ("best of {} by the critic", (0, (1, 3))),
}


def plot(path: Path, report: EvaluationReport, levels: bool = False) -> None:
    """Writes a PNG with a curve for each method and a point for each eta; bars are one standard error.

    Args:
        levels: also draw what majorities and best-of-k of the reference's samples reach.
    """
    figure = Figure(figsize=(7.2, 4.8), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    draw(axes, report, levels)
    axes.set_title(
        f"{report.task}, {report.split}: {report.reference.problems} problems × {report.samples} samples"
        " (± one standard error)",
        fontsize=10,
    )
    figure.savefig(path)


def draw(axes: Axes, report: EvaluationReport, levels: bool = False) -> None:
    """Draws what `plot` draws into existing axes, without a title."""
    reference = report.reference
    assert reference.accuracy is not None
    level, error = reference.accuracy, reference.accuracy_se or 0.0
    axes.axhspan(level - error, level + error, color=GREY, alpha=0.18, linewidth=0)
    axes.axhline(level, color=GREY, linewidth=1, linestyle="--")
    axes.errorbar(
        [0.0], [level], yerr=[error], color=GREY, marker="s", markersize=6, capsize=2.5, linewidth=1.5,
        label="reference",
    )  # fmt: skip
    for name, (label, style) in LEVELS.items() if levels and report.samples > 1 else ():
        height, _ = reference.figure(name)
        if height is not None:
            text = label.format(report.samples)
            axes.axhline(height, color=GREY, linewidth=1, linestyle=style, label=text)
    spare = iter(OTHERS * len(report.results))
    coloured: list[tuple[SettingReport, str]] = []
    for curve in dict.fromkeys(_curve(r) for r in report.results if r.guided):
        method, limit, search = curve
        points = by_strength(r for r in report.results if _curve(r) == curve and r.accuracy is not None)
        colour = (None if limit or search else COLOURS.get(method)) or next(spare)
        label = " ".join(filter(None, (NAMES.get(method, method), limit, search)))
        axes.errorbar(
            [r.point[0] for r in points], [r.point[1] for r in points],
            xerr=[r.kl_se or 0.0 for r in points], yerr=[r.accuracy_se or 0.0 for r in points],
            color=colour, marker="o", markersize=5, capsize=2.5, linewidth=1.5, label=label,
        )  # fmt: skip
        coloured += [(r, colour) for r in points]
    axes.set(
        xlabel="KL to the reference per completion, nats",
        ylabel="mean reward" if report.graded else "accuracy (pass@1)",
    )
    if not report.graded:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.legend(frameon=False, fontsize=9, loc="best")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e9ec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.08)
    _spread_out(axes, [r.point[0] for r, _ in coloured])
    write_etas(axes, coloured, "η = {:g}")


def _curve(result: SettingReport) -> tuple[str, str | None, str | None]:
    """What the points of one curve have in common: the method, what kind of budget there is, and the search."""
    limit = "within a budget" if result.kl_total is not None else "within a budget a token" if result.budget else None
    return result.method, limit, result.search


def _spread_out(axes: Axes, kls: list[float]) -> None:
    """Makes the axis of KL logarithmic beyond its least value, where one setting's KL would crowd all others."""
    if kls and max(kls) > CROWDED * statistics.median(kls) > 0:
        linear = min(kl for kl in kls if kl > 0)
        axes.set_xscale("symlog", linthresh=linear)
        axes.xaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=0.1, subs=(1, 3)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlim(left=-linear / 20)


def by_strength(results: Iterable[SettingReport]) -> list[SettingReport]:
    """Guided settings in order, from weak guidance (a large eta, or little budget) to strong guidance."""
    return sorted(results, key=lambda r: (-(r.eta or 0.0), r.kl_total or math.inf, r.kl_token or math.inf))
