"""An evaluation's report as a table."""

import math
from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from trainer.evaluation.report import SettingReport

NAMES = {"qsharp": "Q♯", "cd": "CD"}
"""Methods as people know them."""


PublishedRows = Mapping[tuple[str, float | None], tuple[str, str]]
"""Accuracy and KL of somebody else's experiment as they are to be shown, by method and eta."""


def tables(
    samples: int, results: Sequence[SettingReport], published: PublishedRows | None = None, graded: bool = False
) -> list[Table]:
    """Tables with a row for each setting, which fit a terminal of 80 columns.

    The first has rewards and KL, the second what can be made of several samples of each problem, if anything, and of
    graded rewards how many are 1. Figures that could not be had are left out.

    Args:
        samples: of each problem.
        results: the reference first.
        published: numbers of somebody else's experiment, for two more columns.
        graded: whether there are rewards other than 0 and 1.
    """
    k = samples
    names = {
        f"majority of {k}": "majority",
        "weighted": "weighted_majority",
        f"best of {k}": "best_of",
        f"oracle {k}": "oracle",
    }
    chosen = {
        title: name for title, name in names.items() if k > 1 and any(r.figure(name)[0] is not None for r in results)
    }
    counted = ["reward 1"] if graded and any(r.full is not None for r in results) else []
    made = [table(results, published, graded)]
    if chosen or counted:
        several = _empty("method", "eta", *counted, *chosen)
        for r in results:
            shares = ["" if r.full is None else f"{100 * r.full:.1f} %" for _ in counted]
            several.add_row(*_setting(r), *shares, *(_reward(r, name, graded) for name in chosen.values()))
        made.append(several)
    return made


def table(results: Sequence[SettingReport], published: PublishedRows | None = None, graded: bool = False) -> Table:
    """The first of `tables`."""
    rows = _empty(
        "method", "eta",
        "mean reward" if graded else "pass@1", "gain" if graded else "gain, points", "gain\n/ s.e.",
        "KL, nats", "tokens", "n", *(("published:\npass@1", "KL") if published else ()),
    )  # fmt: skip
    for r in results:
        gain = r.gain if r.guided else None
        rows.add_row(
            *_setting(r),
            _reward(r, "accuracy", graded),
            "" if gain is None else estimate(gain, r.gain_se, "+.3f" if graded else "+.1f", 1 if graded else 100),
            f"{gain / r.gain_se:+.1f}" if gain is not None and r.gain_se else "",
            "" if r.kl is None else estimate(r.kl, r.kl_se, ".2f"),
            "" if r.tokens is None else f"{r.tokens:.1f}",
            str(r.n),
            *((published or {}).get((r.method, r.eta), ())),
        )
    return rows


def _empty(*titles: str) -> Table:
    rows = Table(*titles, box=SIMPLE_HEAD, padding=0)
    for column in rows.columns[1:]:
        column.justify = "right"
    return rows


def _setting(result: SettingReport) -> tuple[str, str]:
    parts = (NAMES.get(result.method, result.method), result.budget, result.search)
    return " ".join(part for part in parts if part), f"{result.eta:g}" if result.guided else "–"


def _reward(result: SettingReport, name: str, graded: bool) -> str:
    """A mean reward: in percent if it is the share of those that won."""
    value, error = result.figure(name)
    if value is None:
        return ""
    return estimate(value, error, ".3f") if graded else estimate(value, error, ".1f", 100) + " %"


def estimate(value: float, error: float | None, form: str, scale: float = 1) -> str:
    """A value and its standard error, as `form` says; a question mark for an error that is not known."""
    known = error is not None and math.isfinite(error)
    return f"{format(scale * value, form)} ± {format(scale * (error or 0.0), form.lstrip('+')) if known else '?'}"
