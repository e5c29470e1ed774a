"""What a run says on the terminal."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from trainer.training.prepare import Prepared


def print_counts(console: Console, prepared: Prepared) -> None:
    """What was read, left out, and is trained and measured on."""
    c = prepared.counts
    refused = {k: c[k] for k in ("unrewarded", "no_valid_position", "too_long", "uniform_prompts") if c[k]}
    left_out = ", ".join(f"{n} {reason.replace('_', ' ')}" for reason, n in refused.items()) or "none"
    console.print(
        f"rollouts: {c['read']} read, {c['duplicates']} duplicates; left out: {left_out}\n"
        f"training on {c['train_rollouts']} of {c['train_prompts']} prompts, "
        f"measuring on {c['held_out_rollouts']} of {c['held_out_prompts']} other prompts"
    )


def print_report(console: Console, result: dict[str, Any], folder: Path, run: Path) -> None:
    """Held-out measures, the comparison with the parent, and where all is."""
    if result["held_out"]:
        table = Table(title="held-out prompts", title_justify="left")
        for column in ("position", "log-loss", "Brier", "AUC", "ECE", "n"):
            table.add_column(column, justify="left" if column == "position" else "right")
        held_out = result["held_out"]
        entries = [("all", held_out["overall"]), *((e["part"], e) for e in held_out["by_position"])]
        entries.append(("last token", held_out["last_token"]))
        if held_out["branches"]:
            entries.append(("branches", held_out["branches"]))
        for part, e in entries:
            auc = "–" if e["auc"] is None else f"{e['auc']:.4f}"
            table.add_row(part, f"{e['log_loss']:.4f}", f"{e['brier']:.4f}", auc, f"{e['ece']:.4f}", f"{e['n']:,}")
        console.print(table)
    comparison = (result["parent"] or {}).get("comparison")
    if comparison:
        error = comparison["standard_error"]
        console.print(
            f"against {result['parent']['critic']}: {comparison['by'].replace('_', ' ')} better by "
            f"{comparison['improvement']:+.5f}" + (f" ± {error:.5f}" if error is not None else "")
        )
    console.print(f"published [bold]{folder}[/bold]; report and plot in {run}", soft_wrap=True)
