"""The learning curve: held-out loss and AUC over the steps, with the best constant prediction drawn in."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from trainer.training.plots import BLUE, GREY, ORANGE, tidy
from trainer.training.report import HeldOutLine


def learning_curve(path: Path, lines: Sequence[HeldOutLine], title: str) -> None:
    """Writes a PNG; the least loss is marked.

    Args:
        path: of the file.
        lines: measurements after some of the steps; at least one.
        title: of the figure.
    """
    figure = Figure(figsize=(9.0, 3.6), dpi=130, layout="constrained")
    losses, aucs = figure.subplots(1, 2)
    steps = [line.step for line in lines]
    overall = [line.held_out for line in lines]
    best = min(range(len(lines)), key=lambda i: overall[i].log_loss)
    losses.plot(steps, [one.log_loss for one in overall], color=BLUE, marker="o", markersize=4, label="critic")
    losses.plot(steps[best], overall[best].log_loss, color=ORANGE, marker="o", markersize=8, zorder=3, label="least")
    constant = overall[-1].log_loss_constant
    if constant is not None:
        losses.axhline(constant, color=GREY, linestyle="--", linewidth=1.2, label="best constant")
    losses.set(xlabel="step", ylabel="held-out log-loss, nats")
    losses.legend(frameon=False, fontsize=8.5)
    known = [(step, one.auc) for step, one in zip(steps, overall, strict=True) if one.auc is not None]
    aucs.plot([step for step, _ in known], [auc for _, auc in known], color=BLUE, marker="o", markersize=4)
    aucs.axhline(0.5, color=GREY, linestyle="--", linewidth=1.2)
    aucs.set(xlabel="step", ylabel="held-out AUC")
    for axes in (losses, aucs):
        tidy(axes)
    figure.suptitle(title, fontweight="bold", fontsize=11)
    figure.savefig(path)
