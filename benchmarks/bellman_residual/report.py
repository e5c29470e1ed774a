"""The two tables, and the same as JSON's data."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.bellman_residual.statistics import (
    SCORES,
    Answer,
    answers_to_notice,
    fires,
    higher,
    mean_residual,
    tells,
)


def made(answers: Mapping[str, Sequence[Answer]], right: str) -> dict[str, Any]:
    """All figures.

    Args:
        answers: by critic.
        right: the critic that the others are compared with.
    """
    asked_twice = [a for a in answers[right] if len(a.deltas)]
    telling = {
        name: dict(zip(("auc", "se"), tells(asked_twice, score), strict=True), n=len(asked_twice))
        for name, score in SCORES.items()
    }
    noticing = {critic: _figures(of_critic, answers[right]) for critic, of_critic in answers.items()}
    return {"critic": right, "telling": telling, "noticing": noticing}


def _figures(answers: Sequence[Answer], right: Sequence[Answer]) -> dict[str, Any]:
    deltas = np.concatenate([a.deltas for a in answers])
    mean, error = mean_residual(answers)
    own = answers is right
    with_deltas, right_with_deltas = ([a for a in some if len(a.deltas)] for some in (answers, right))
    return {
        "answers": len(answers),
        "right": float(np.mean([a.right for a in answers])),
        "answers_with_deltas": len(with_deltas),
        "deltas": len(deltas),
        "mean": mean,
        "mean_se": error,
        "median": float(np.median(np.abs(deltas))),
        "p90": float(np.quantile(np.abs(deltas), 0.9)),
        "mean_delta": float(deltas.mean()),
        "auc": None if own else higher(with_deltas, right_with_deltas),
        "of_tail": sum(a.of_tail for a in answers),
        "asked": sum(len(a.values) for a in answers),
        "fires": fires(right, answers),
        "noticed_after": None if own else answers_to_notice(right, answers),
    }


def show(report: Mapping[str, Any]) -> None:
    """Prints both: what tells right from wrong answers, and what the residual is of each critic."""
    telling = Table("an answer's", "AUC for right against wrong", "n")
    for name, found in report["telling"].items():
        telling.add_row(name, f"{found['auc']:.3f} ± {found['se']:.3f}", str(found["n"]))
    noticing = Table(
        "critic", "right", "mean |delta|", "median", "90 %", "mean delta", "an answer", "tail / asked", "AUC",
        "to notice", "alert fires",
    )  # fmt: skip
    for name, found in report["noticing"].items():
        own = name == report["critic"]
        noticing.add_row(
            name,
            f"{100 * found['right']:.1f} %",
            f"{found['mean']:.4f} ± {found['mean_se']:.4f}",
            f"{found['median']:.4f}",
            f"{found['p90']:.4f}",
            f"{found['mean_delta']:+.4f}",
            f"{found['deltas'] / found['answers']:.1f}",
            f"{found['of_tail']} / {found['asked']}",
            "" if own else f"{found['auc']:.3f}",
            "" if own else str(found["noticed_after"] or "more"),
            f"{100 * found['fires']:.0f} %",
        )
    console = Console(width=140)
    console.print(telling)
    console.print(noticing)
