"""Tables of a calibration, by position, and the reliability diagrams."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from benchmarks.guidance.tables import table
from trainer.training import measures
from trainer.training.heldout import PARTS, Predictions
from trainer.training.plots import BLUE, GREY, ORANGE, tidy
from trainer.training.reliability import reliability

FIFTHS = ("first fifth", "second fifth", "third fifth", "fourth fifth", "last fifth")
assert len(FIFTHS) == PARTS


def rows(raw: Predictions, scaled: Predictions, bounds: tuple[float, float]) -> list[dict[str, Any]]:
    """Figures of each fifth of the completions, and of all of them.

    Args:
        raw, scaled: predictions at the same labels.
        bounds: least and greatest reward.
    """
    everywhere = np.ones(len(raw.part), dtype=bool)
    parts = [(name, raw.part == part) for part, name in enumerate(FIFTHS)]
    return [
        {
            "part": name, "n": int(chosen.sum()), "rollouts": len(np.unique(raw.rollout[chosen])),
            "earned": float(np.average(raw.rewards[chosen], weights=raw.weights[chosen])),
            "raw": _figures(raw, chosen, bounds), "scaled": _figures(scaled, chosen, bounds),
        }
        for name, chosen in [*parts, ("all", everywhere)]
        if chosen.any()
    ]  # fmt: skip


def _figures(predictions: Predictions, chosen: NDArray[np.bool_], bounds: tuple[float, float]) -> dict[str, float]:
    predicted, weights = predictions.predicted[chosen], predictions.weights[chosen]
    return {
        "predicted": float(np.average(predicted, weights=weights)),
        "ece": measures.ece(predicted, predictions.rewards[chosen], weights, bounds),
        "log_loss": float(np.average(predictions.losses[chosen], weights=weights)),
        "brier": measures.brier(predicted, predictions.rewards[chosen], weights),
    }


def diagrams(path: Path, raw: Predictions, scaled: Predictions, title: str, bounds: tuple[float, float]) -> None:
    """Writes a PNG with a reliability diagram of each fifth of the completions; bars are 95 %."""
    figure = Figure(figsize=(15, 3.9), dpi=130, layout="constrained")
    panels = figure.subplots(1, PARTS, sharex=True, sharey=True)
    for part, axes in enumerate(panels):
        axes.plot(bounds, bounds, color=GREY, linewidth=1, linestyle="--")
        for predictions, colour, label in ((raw, BLUE, "as it is"), (scaled, ORANGE, "scaled")):
            chosen = predictions.part == part
            if not chosen.any():
                continue
            bins = reliability(selected(predictions, chosen))
            axes.errorbar(
                [b.predicted for b in bins], [b.earned for b in bins], yerr=[1.96 * b.error for b in bins],
                color=colour, marker="o", markersize=4, linewidth=1.3, capsize=2, label=label,
            )  # fmt: skip
        axes.set(title=FIFTHS[part], xlabel="expected reward E[Z]", xlim=bounds)
        tidy(axes)
    panels[0].set_ylabel("mean reward earned")
    panels[0].legend(frameon=False, fontsize=8.5, loc="upper left")
    figure.suptitle(title, fontweight="bold", fontsize=12)
    figure.savefig(path)


def selected(predictions: Predictions, chosen: NDArray[np.bool_]) -> Predictions:
    """The predictions at some labels."""
    return Predictions(**{one.name: getattr(predictions, one.name)[chosen] for one in fields(Predictions)})


def page(report: dict[str, Any]) -> str:
    """Markdown."""
    low, high = report["temperature_95"]
    gain = report["gain"]
    halves = " and ".join(f"{one:.3f}" for one in report["halves"])
    made = f"""# Calibration of {report["critic"]}

Made by `{report["command"]}` on {report["date"]}:
{report["rollouts"]} held-out rollouts of {report["prompts"]} prompts.

Temperature {report["temperature"]:.3f} (95 % of bootstraps over prompts: {low:.3f} to {high:.3f}); of halves {halves}.
Scaled figures are of the temperature that the other half of the prompts has. It makes the log-loss less by
{gain["improvement"]:+.4f} ± {_error(gain["standard_error"], 1, 4)} nats (one standard error over prompts).

{_by_position(report["positions"])}
"""
    return made if "guided" not in report else made + "\n" + _guided(report["guided"], report["asked"])


def _by_position(found: Sequence[dict[str, Any]]) -> str:
    head = ("positions", "n", "rollouts", "earned", "expected", "scaled", "ECE", "scaled", "log-loss", "scaled")
    return table(
        head,
        (
            (
                row["part"], row["n"], row["rollouts"], f"{row['earned']:.3f}",
                *(f"{row[side][name]:.3f}" for name in ("predicted", "ece", "log_loss") for side in ("raw", "scaled")),
            )
            for row in found
        ),
    )  # fmt: skip


def _guided(found: Sequence[dict[str, Any]], asked: dict[str, Any]) -> str:
    head = ("eta", "accuracy", "scaled", "change, points", "KL, nats", "scaled", "change")
    lines = []
    for row in found:
        sides = [row.get(side) for side in ("raw", "scaled", "change")]
        lines.append(
            (
                "–" if row["eta"] is None else f"{row['eta']:g}",
                *("" if one is None else _cell(one["accuracy"], 100, 1, i == 2) for i, one in enumerate(sides)),
                *("" if one is None else _cell(one["kl"], 1, 3, i == 2) for i, one in enumerate(sides)),
            )
        )
    return (
        f"Guidance on held-out problems of `{asked['task']}`, {asked['samples']} samples each, T = 1, "
        f"{asked['candidates']} candidates, `min_prob` 0; ± is one standard error over problems, changes are paired."
        "\n\n"
        f"{table(head, lines)}\n"
    )


def _cell(value: dict[str, Any], scale: float, digits: int, signed: bool) -> str:
    sign = "+" if signed else ""
    return f"{scale * value['mean']:{sign}.{digits}f} ± {_error(value['se'], scale, digits)}"


def _error(value: float | None, scale: float, digits: int) -> str:
    return "–" if value is None else f"{scale * value:.{digits}f}"
