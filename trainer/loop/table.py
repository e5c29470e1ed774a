"""A loop's report as tables."""

from rich.box import SIMPLE_HEAD
from rich.table import Table

from trainer.evaluation.table import estimate
from trainer.loop.report import LoopReport
from trainer.training.report import Measures


def table(report: LoopReport) -> Table:
    """A row for each round, for terminals of 80 columns; `reasons` says why a version guides, or does not."""
    rows = Table(
        "round", "guided by", "rollouts", "mean\nreward", "version", "log-loss\n(constant)", "AUC", "active", "minutes",
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


def evaluations(report: LoopReport) -> Table | None:
    """What was measured after the rounds, the reference alone and at each strength; None if nothing was."""
    rows = Table("round", "guided by", "eta", "mean\nreward", "gain", "KL, nats", "n", box=SIMPLE_HEAD, padding=0)
    for column in rows.columns[2:]:
        column.justify = "right"
    for entry in report.rounds:
        if entry.evaluate is None:
            continue
        for one in entry.evaluate.results:
            guided = one.eta is not None
            rows.add_row(
                str(entry.round),
                entry.evaluate.critic if guided else "reference",
                f"{one.eta:g}" if guided else "–",
                "" if one.accuracy is None else estimate(one.accuracy, one.accuracy_se, ".3f"),
                "" if one.gain is None or not guided else estimate(one.gain, one.gain_se, "+.3f"),
                "" if one.kl is None else estimate(one.kl, one.kl_se, ".2f"),
                str(one.n),
            )
    return rows if rows.row_count else None


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
