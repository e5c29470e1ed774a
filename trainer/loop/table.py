"""A loop's report as a table."""

from rich.box import SIMPLE_HEAD
from rich.table import Table

from trainer.loop.report import LoopReport
from trainer.training.report import Measures


def table(report: LoopReport) -> Table:
    """A row for each round, for terminals of 80 columns; `reasons` says why a version guides, or does not."""
    rows = Table(
        "round", "guided by", "rollouts", "mean\nreward", "version", "log-loss\n(constant)", "AUC", "active", "min",
        box=SIMPLE_HEAD, padding=0,
    )  # fmt: skip
    for column in rows.columns[2:]:
        column.justify = "right"
    for entry in report.rounds:
        mean = entry.reward.mean if entry.reward else None
        held_out = entry.train.held_out.overall if entry.train and entry.train.held_out else None
        rows.add_row(
            str(entry.round),
            (entry.collect.guided_by if entry.collect else None) or "reference",
            str(entry.collect.wanted) if entry.collect else "",
            "" if mean is None else f"{mean:.3f}",
            entry.train.critic if entry.train else "",
            _losses(held_out),
            "" if held_out is None or held_out.auc is None else f"{held_out.auc:.3f}",
            "" if entry.activate is None else "yes" if entry.activate.activated else "no",
            f"{sum(entry.seconds.values()) / 60:.1f}",
        )
    return rows


def reasons(report: LoopReport) -> list[str]:
    """Why each round's version guides, or does not."""
    return [
        f"{entry.train.critic}: {entry.activate.why}"
        for entry in report.rounds
        if entry.train is not None and entry.activate is not None
    ]


def _losses(held_out: Measures | None) -> str:
    if held_out is None:
        return ""
    constant = held_out.log_loss_constant
    return f"{held_out.log_loss:.4f}" + ("" if constant is None else f" ({constant:.4f})")
