"""An evaluation's report as a table."""

import math
from collections.abc import Mapping, Sequence

from rich.table import Table

from trainer.evaluation.report import SettingReport

NAMES = {"qsharp": "Q♯", "cd": "CD"}
"""Methods as people know them."""


PublishedRows = Mapping[tuple[str, float | None], tuple[str, str]]
"""Accuracy and KL of somebody else's experiment as they are to be shown, by method and eta."""


def table(samples: int, results: Sequence[SettingReport], published: PublishedRows | None = None) -> Table:
    """A table with a row for each setting; figures that could not be had are left out.

    Args:
        samples: of each problem.
        results: the reference first.
        published: numbers of somebody else's experiment, for two more columns.
    """
    k = samples
    names = {
        f"maj@{k}": "majority",
        f"wmaj@{k}": "weighted_majority",
        f"best of {k}": "best_of",
        f"oracle {k}": "oracle",
    }
    columns = {
        title: name for title, name in names.items() if k > 1 and any(r.figure(name)[0] is not None for r in results)
    }
    table = Table("method", "eta", "pass@1", "gain, points", "gain / s.e.", "KL, nats", "tokens", *columns, "n")
    for title in ("published: pass@1", "KL") if published else ():
        table.add_column(title)
    for column in table.columns[1:]:
        column.justify = "right"
    for r in results:
        gain = r.gain if r.guided else None
        table.add_row(
            NAMES.get(r.method, r.method),
            f"{r.eta:g}" if r.guided else "–",
            _percent(r, "accuracy"),
            "" if gain is None else f"{100 * gain:+.1f} ± {_error(100, r.gain_se, '.1f')}",
            f"{gain / r.gain_se:+.1f}" if gain is not None and r.gain_se else "",
            f"{r.kl:.2f} ± {_error(1, r.kl_se, '.2f')}",
            f"{r.tokens:.1f}",
            *(_percent(r, name) for name in columns.values()),
            str(r.n),
            *((published or {}).get((r.method, r.eta), ())),
        )
    return table


def _percent(result: SettingReport, name: str) -> str:
    value, error = result.figure(name)
    return "" if value is None else f"{100 * value:.1f} ± {_error(100, error, '.1f')} %"


def _error(scale: float, error: float | None, form: str) -> str:
    return "?" if error is None or not math.isfinite(error) else format(scale * error, form)
