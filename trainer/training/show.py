"""What a training run prints on the terminal."""

from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from qsharp_core.locations import Location
from trainer.training.prepare import Prepared
from trainer.training.report import HeldOutReport, Measures, TrainingReport

LEFT_OUT = {
    "unrewarded": "without a reward",
    "no_valid_position": "not the reference's own (guided to their end)",
    "too_long": "too long",
    "uniform_prompts": "of prompts whose rewards are all the same",
}
"""Why rollouts are left out, by the count's name."""


def print_counts(console: Console, prepared: Prepared) -> None:
    """Prints how many rollouts were read and left out, and how many are trained and measured on."""
    c = prepared.counts
    refused = {reason: c[reason] for reason in LEFT_OUT if c[reason]}
    left_out = ", ".join(f"{n} {LEFT_OUT[reason]}" for reason, n in refused.items()) or "none"
    console.print(
        f"rollouts: {c['read']} read, {c['duplicates']} duplicates; left out: {left_out}\n"
        f"training on {c['train_rollouts']} rollouts of {c['train_prompts']} prompts, "
        f"measuring on {c['held_out_rollouts']} of {c['held_out_prompts']} other prompts"
    )


def print_held_out(console: Console, held_out: HeldOutReport) -> None:
    """Prints held-out measures, each beside that of the best constant prediction."""
    table = Table(
        title="held-out prompts, which were not trained on",
        caption="the log-loss of all positions decides whether it is published",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE,
    )
    for column in ("position", "log-loss (constant)", "Brier (constant)", "AUC", "ECE", "n"):
        table.add_column(column, justify="left" if column == "position" else "right")
    entries: list[tuple[str, Measures]] = [("all", held_out.overall)]
    entries += [(measures.part, measures) for measures in held_out.by_position]
    entries.append(("last token", held_out.last_token))
    if held_out.branches:
        entries.append(("branches", held_out.branches))
    for part, m in entries:
        auc = "–" if m.auc is None else f"{m.auc:.3f}"
        constant = "" if m.log_loss_constant is None else f" ({m.log_loss_constant:.4f})"
        losses = f"{m.log_loss:.4f}{constant}", f"{m.brier:.4f} ({m.brier_constant:.4f})"
        table.add_row(part, *losses, auc, f"{m.ece:.3f}", f"{m.n:,}")
    console.print(table)


def print_report(console: Console, report: TrainingReport, folder: Location, run: Path) -> None:
    """Prints held-out measures, the comparison with the parent, and where the results are."""
    if report.held_out:
        print_held_out(console, report.held_out)
    if report.parent and (comparison := report.parent.comparison):
        error = comparison.standard_error
        console.print(
            f"against {report.parent.critic}: {comparison.by.replace('_', ' ')} better by "
            f"{comparison.improvement:+.5f}" + (f" ± {error:.5f}" if error is not None else "")
        )
    console.print(f"published [bold]{folder}[/bold]; report and plot in {run}", soft_wrap=True)
