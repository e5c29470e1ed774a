"""The report as people read it: a plot of accuracy against KL, and a table."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from trainer.evaluate import REFERENCE

COLOURS = {"qsharp": "#2b6cb0", "cd": "#c05621"}
OTHERS = ("#2f855a", "#6b46c1")
GREY = "#8a94a0"
NAMES = {"qsharp": "Q♯", "cd": "CD"}
# What else one can do with k samples of the reference, drawn as levels.
LEVELS = {
    "majority": ("majority of {}", ":"),
    "weighted_majority": ("weighted majority of {}", "-."),
    "best_of": ("best of {} by the critic", (0, (1, 3))),
}


def plot(path: Path, report: dict[str, Any], levels: bool = False) -> None:
    """Writes a PNG: a curve per method, a point per eta, bars of one standard error both ways.

    Args:
        levels: draw what majorities and best-of-k of the reference's samples reach, too.
    """
    figure = Figure(figsize=(7.2, 4.8), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    draw(axes, report, levels)
    reference = next(r for r in report["results"] if r["method"] == REFERENCE)
    axes.set_title(
        f"{report['task']}, {report['split']}: {reference['problems']} problems × {report['samples']} samples"
        " (± one standard error)",
        fontsize=10,
    )
    figure.savefig(path)


def draw(axes: Axes, report: dict[str, Any], levels: bool = False) -> None:
    """The same into given axes, without a title."""
    results = report["results"]
    reference = next(r for r in results if r["method"] == REFERENCE)
    level, error = reference["accuracy"], reference["accuracy_se"] or 0.0
    axes.axhspan(level - error, level + error, color=GREY, alpha=0.18, linewidth=0)
    axes.axhline(level, color=GREY, linewidth=1, linestyle="--")
    axes.errorbar(
        [0.0], [level], yerr=[error], color=GREY, marker="s", markersize=6, capsize=2.5, linewidth=1.5,
        label="reference",
    )  # fmt: skip
    for name, (label, style) in LEVELS.items() if levels and report["samples"] > 1 else ():
        if reference[name] is not None:
            text = label.format(report["samples"])
            axes.axhline(reference[name], color=GREY, linewidth=1, linestyle=style, label=text)
    methods = list(dict.fromkeys(r["method"] for r in results if r["method"] != REFERENCE))
    spare = iter(OTHERS * len(methods))
    coloured: list[tuple[dict[str, Any], str]] = []
    for method in methods:
        points = [r for r in results if r["method"] == method and r["accuracy"] is not None]
        points.sort(key=lambda r: -r["eta"])  # from weak to strong
        colour = COLOURS.get(method) or next(spare)
        axes.errorbar(
            [r["kl"] for r in points], [r["accuracy"] for r in points],
            xerr=[r["kl_se"] or 0.0 for r in points], yerr=[r["accuracy_se"] or 0.0 for r in points],
            color=colour, marker="o", markersize=5, capsize=2.5, linewidth=1.5, label=NAMES.get(method, method),
        )  # fmt: skip
        coloured += [(r, colour) for r in points]
    axes.set(xlabel="KL to the reference per completion, nats", ylabel="accuracy (pass@1)")
    axes.legend(frameon=False, fontsize=9, loc="best")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e9ec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.08)
    write_etas(axes, coloured, "η = {:g}")


def write_etas(axes: Axes, points: Iterable[tuple[dict[str, Any], str]], form: str) -> None:
    """Writes each point's eta beside it, in its colour, but not over another one's; limits are to be final."""
    wide, high = 9 * len(form.format(0.1)), 18  # pixels, about what such a text takes
    taken: list[tuple[float, float]] = []
    axes.autoscale_view()  # else limits wait for the drawing
    for r, colour in points:
        x, y = axes.transData.transform((r["kl"], r["accuracy"]))
        if all(abs(x - a) > wide or abs(y - b) > high for a, b in taken):
            taken.append((x, y))
            axes.annotate(
                form.format(r["eta"]), (r["kl"], r["accuracy"]), textcoords="offset points", xytext=(6, -11),
                fontsize=8, color=colour,
            )  # fmt: skip


def table(report: dict[str, Any], published: Mapping[tuple[str, float | None], tuple[str, str]] | None = None) -> Table:
    """A row per setting; figures that could not be had are left out.

    Args:
        published: by method and eta, what somebody else's experiment had as accuracy and KL; for people.
    """
    k, results = report["samples"], report["results"]
    columns = {
        f"maj@{k}": "majority",
        f"wmaj@{k}": "weighted_majority",
        f"best of {k}": "best_of",
        f"oracle {k}": "oracle",
    }
    shown = {title: name for title, name in columns.items() if k > 1 and any(r[name] is not None for r in results)}
    made = Table("method", "eta", "pass@1", "gain, points", "gain / s.e.", "KL, nats", "tokens", *shown, "n")
    for title in ("published: pass@1", "KL") if published else ():
        made.add_column(title)
    for column in made.columns[1:]:
        column.justify = "right"
    for r in results:
        guided = r["method"] != REFERENCE
        made.add_row(
            NAMES.get(r["method"], r["method"]),
            f"{r['eta']:g}" if guided else "–",
            _percent(r, "accuracy"),
            f"{100 * r['gain']:+.1f} ± {_error(100, r['gain_se'], '.1f')}" if guided and r["gain"] is not None else "",
            f"{r['gain'] / r['gain_se']:+.1f}" if guided and r["gain_se"] else "",
            f"{r['kl']:.2f} ± {_error(1, r['kl_se'], '.2f')}",
            f"{r['tokens']:.1f}",
            *(_percent(r, name) for name in shown.values()),
            str(r["n"]),
            *((published or {}).get((r["method"], r["eta"]), ())),
        )
    return made


def _percent(result: dict[str, Any], name: str) -> str:
    value = result[name]
    return "" if value is None else f"{100 * value:.1f} ± {_error(100, result[f'{name}_se'], '.1f')} %"


def _error(scale: float, error: float | None, form: str) -> str:
    return "?" if error is None or not math.isfinite(error) else format(scale * error, form)
