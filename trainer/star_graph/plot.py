"""`report.png`: accuracy against KL, with the least KL that it could have, and accuracy over eta."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from trainer.demo.plot import panels
from trainer.evaluate_plot import GREY
from trainer.star_graph.report import least_kl


def plot(path: Path, report: dict[str, Any]) -> None:
    """Writes it; bars are one standard error."""
    figure = Figure(figsize=(10.4, 4.4), dpi=140, layout="constrained")
    left, _ = panels(figure, report, "linear")  # no KL is far above ln d
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
