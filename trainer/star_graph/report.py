"""What came of it: report.json, and the table."""

import math
from typing import Any

from rich.table import Table

from trainer.evaluate import REFERENCE
from trainer.evaluate_plot import table as evaluation_table

REPORT = "report.json"
FIGURES = ("accuracy", "accuracy_se", "gain", "gain_se", "kl", "kl_se", "tokens", "tokens_se")


def made(graph: str, degree: int, stages: dict[str, Any], evaluated: dict[str, Any]) -> dict[str, Any]:
    """The report.

    Args:
        graph: what was measured, as `G(5,5)`.
        stages: how the trainings went.
        evaluated: the evaluation's report.
    """
    results = evaluated["results"]
    reference = next(r for r in results if r["method"] == REFERENCE)
    best = max((r for r in results if r["method"] == "qsharp"), key=lambda r: (r["accuracy"], -r["kl"]), default=None)
    seconds = {name: stage["seconds"] for name, stage in stages.items()} | {"evaluation": evaluated["seconds"]}
    return {
        **{name: evaluated[name] for name in ("task", "split", "samples", "critic", "seed")},
        "graph": graph,
        "shortcut": 1 / degree,
        "least_kl": math.log(degree),
        "reference": reference["accuracy"],
        "best": best and {name: best[name] for name in ("method", "eta", "accuracy", "accuracy_se", "kl", "kl_se")},
        "results": results,
        "stages": stages,
        "seconds": seconds | {"all": sum(seconds.values())},
    }


def least_kl(accuracy: float, reference: float) -> float:
    """The least KL, in nats, of any policy that is right so often, where the reference is so `reference` of the time.

    `KL(Bernoulli(accuracy) ‖ Bernoulli(reference))`, by the data-processing inequality.
    """
    assert 0 < reference < 1
    right = accuracy * math.log(accuracy / reference) if accuracy > 0 else 0.0
    wrong = (1 - accuracy) * math.log((1 - accuracy) / (1 - reference)) if accuracy < 1 else 0.0
    return right + wrong


def table(report: dict[str, Any]) -> Table:
    """A row per method and eta."""
    shown = evaluation_table(report)
    shown.title = (
        f"{report['graph']}, {report['results'][0]['problems']} held-out graphs; the shortcut is right "
        f"{report['shortcut']:.3f} of the time, and always taking the right arm costs {report['least_kl']:.2f} nats"
    )
    return shown
