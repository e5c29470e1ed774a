"""A loop's report as a table."""

from rich.table import Table

from trainer.loop.report import ActivateResult, LoopReport
from trainer.training.report import Measures


def table(report: LoopReport) -> Table:
    """A table with a row for each round."""
    rows = Table(
        "round", "guided by", "rollouts", "mean reward", "version", "log-loss (constant)", "AUC", "active", "min"
    )
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
            _active(entry.activate),
            f"{sum(entry.seconds.values()) / 60:.1f}",
        )
    return rows


def _losses(held_out: Measures | None) -> str:
    if held_out is None:
        return ""
    constant = held_out.log_loss_constant
    return f"{held_out.log_loss:.4f}" + ("" if constant is None else f" ({constant:.4f})")


def _active(activated: ActivateResult | None) -> str:
    if activated is None:
        return ""
    return "yes" if activated.activated else f"no: {activated.why}"
