"""An ablation's report.png: accuracy against KL."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from trainer.evaluation.plot import GREY
from trainer.evaluation.settings import REFERENCE
from trainer.experiments.ablation.report import SettingOverSeeds, VariantOutcome, VariantOverSeeds
from trainer.experiments.ablation.settings import Ablation

MARKERS = "os^Dv*"


def plot(
    path: Path, recipe: Ablation, variants: Sequence[VariantOverSeeds], outcomes: Sequence[VariantOutcome]
) -> None:
    """Draws a curve for each variant and a point for each setting of the first method, and seeds as pale dots."""
    method = recipe.evaluate.methods[0]
    figure = Figure(figsize=(7.8, 5.0), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    for i, variant in enumerate(variants):
        points = sorted((one for one in variant.results if one.method == method), key=lambda one: -(one.eta or 0.0))
        points = [one for one in points if one.kl is not None and one.accuracy is not None]
        (x, x_error), (y, y_error) = _coordinates(points, "kl"), _coordinates(points, "accuracy")
        axes.errorbar(
            x, y, xerr=x_error, yerr=y_error, color=f"C{i % 10}", marker=MARKERS[i % len(MARKERS)], markersize=5,
            capsize=2, linewidth=1.4, elinewidth=0.8, label=variant.variant,
        )  # fmt: skip
        if len(variant.seeds) > 1:
            seeds = [
                result.point
                for one in outcomes
                for result in one.results
                if one.variant["name"] == variant.variant and result.method == method and result.accuracy is not None
            ]
            axes.plot(*zip(*seeds, strict=True), ".", color=f"C{i % 10}", markersize=4, alpha=0.4)
    reference = next(one for one in variants[0].results if one.method == REFERENCE)
    if reference.accuracy is not None:
        axes.axhline(reference.accuracy.mean, color=GREY, linewidth=1.2, linestyle="--", label="reference")
    axes.set(xlabel="KL to the reference per completion, nats", ylabel="accuracy (pass@1)")
    seeds_said = f", {len(variants[0].seeds)} seeds" if len(variants[0].seeds) > 1 else ""
    problems = outcomes[0].results[0].problems
    axes.set_title(
        f"{recipe.source}: {problems} problems × {recipe.evaluate.samples} samples{seeds_said}, {method} over eta "
        "(± one standard error)",
        fontsize=10,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e9ec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)


def _coordinates(points: Sequence[SettingOverSeeds], name: str) -> tuple[list[float], list[float]]:
    figures = [getattr(one, name) for one in points]
    return [one.mean for one in figures], [one.se or 0.0 for one in figures]
