"""A loop's report as people read it."""

from typing import Any

from rich.table import Table


def table(report: dict[str, Any]) -> Table:
    """A row per round."""
    made = Table(
        "round", "guided by", "rollouts", "mean reward", "version", "log-loss (constant)", "AUC", "active", "min"
    )
    for entry in report["rounds"]:
        collected, rewarded, trained, activated = (
            entry[name] or {} for name in ("collect", "reward", "train", "activate")
        )
        held_out = (trained.get("held_out") or {}).get("overall", {})
        mean = rewarded.get("mean")
        made.add_row(
            str(entry["round"]),
            collected.get("guided_by") or "reference",
            str(collected.get("wanted", "")),
            "" if mean is None else f"{mean:.3f}",
            trained.get("critic", ""),
            _losses(held_out),
            "" if held_out.get("auc") is None else f"{held_out['auc']:.3f}",
            _said(activated),
            f"{sum(entry['seconds'].values()) / 60:.1f}",
        )
    return made


def _losses(held_out: dict[str, Any]) -> str:
    if not held_out:
        return ""
    constant = held_out.get("log_loss_constant")
    return f"{held_out['log_loss']:.4f}" + ("" if constant is None else f" ({constant:.4f})")


def _said(activated: dict[str, Any]) -> str:
    if not activated:
        return ""
    return "yes" if activated["activated"] else f"no: {activated['why']}"
