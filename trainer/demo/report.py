"""What the demo found: `report.json`, and the table."""

from typing import Any

from rich.table import Table

from trainer.evaluate import REFERENCE
from trainer.evaluate_plot import NAMES

FIGURES = ("accuracy", "accuracy_se", "gain", "gain_se", "kl", "kl_se", "tokens")


def made(loop: dict[str, Any], evaluated: dict[str, Any], eta: float, started: float) -> dict[str, Any]:
    """The report.

    Args:
        loop: report of the rounds.
        evaluated: report of the evaluation.
        eta: what was chosen before anything was measured.
        started: seconds that the server took.
    """
    results = [
        {name: result[name] for name in ("method", "eta", "problems", "n", *FIGURES)} for result in evaluated["results"]
    ]
    chosen = next(r for r in results if (r["method"], r["eta"]) == ("qsharp", eta))
    seconds = {"server": started}
    for entry in loop["rounds"]:
        seconds |= {f"round {entry['round']}: {stage}": value for stage, value in entry["seconds"].items()}
    seconds["evaluate"] = evaluated["seconds"]
    return {
        "task": evaluated["task"],
        "split": evaluated["split"],
        "critic": loop["critic"],
        "eta": eta,
        "gain": chosen["gain"],
        "gain_se": chosen["gain_se"],
        "standard_errors": chosen["gain"] / chosen["gain_se"],
        "results": results,
        "rounds": [round_of(entry) for entry in loop["rounds"]],
        "seconds": seconds | {"all": sum(seconds.values())},
    }


def round_of(entry: dict[str, Any]) -> dict[str, Any]:
    """What a round came to, from its entry in the loop's report."""
    trained, activated = entry["train"], entry["activate"]
    return {
        "round": entry["round"],
        "guided_by": entry["collect"]["guided_by"],
        "rollouts": entry["collect"]["wanted"],
        "critic": trained["critic"],
        "steps": trained["steps"],
        "held_out": trained["held_out"]["overall"],
        "against_parent": (trained["parent"] or {}).get("comparison"),
        "activated": activated["activated"],
        "why": activated["why"],
    }


def table(report: dict[str, Any]) -> Table:
    """A row per method and eta."""
    shown = Table("method", "eta", "pass@1", "gain, points", "gain / s.e.", "KL, nats", "n", title_justify="left")
    for column in shown.columns[1:]:
        column.justify = "right"
    for r in report["results"]:
        guided = r["method"] != REFERENCE
        shown.add_row(
            NAMES.get(r["method"], r["method"]),
            f"{r['eta']:g}" if guided else "–",
            f"{100 * r['accuracy']:.1f} ± {100 * r['accuracy_se']:.1f} %",
            f"{100 * r['gain']:+.1f} ± {100 * r['gain_se']:.1f}" if guided else "",
            f"{r['gain'] / r['gain_se']:+.1f}" if guided else "",
            f"{r['kl']:.2f} ± {r['kl_se']:.2f}",
            str(r["n"]),
            style="bold" if (r["method"], r["eta"]) == ("qsharp", report["eta"]) else None,
        )
    return shown
