"""What was measured as Markdown, a plot and JSON's data."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.alternatives.measuring import Policy
from benchmarks.alternatives.tuning import Tuned, Tuning
from benchmarks.guidance.tables import table
from benchmarks.search_frontier.choosing import Point, gain, plain
from benchmarks.search_frontier.report import colours_of, draw, of_accuracy

Gain = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A policy with some samples of which one is chosen.

    Attributes:
        policy, point: what it is, and what it reaches.
        above_reference: what it has above a single sample of the reference, paired by problem, and its standard error.
        above_guided: the same above the guided policy at as many tokens, by the same rule; None for that policy.
    """

    policy: Policy
    point: Point
    above_reference: Gain
    above_guided: Gain | None


@dataclass(frozen=True, kw_only=True)
class Training:
    """A fine-tuned model: how it was made, what that came to, and its own estimates.

    Attributes:
        policy: of this seed alone.
        log_ratio: the mean of log π − log π_ref over its samples, in nats, and its standard error.
    """

    tuning: Tuning
    tuned: Tuned
    policy: Policy
    log_ratio: tuple[float, float | None]


def rows_of(policies: Sequence[Policy], size: int) -> list[Row]:
    """Rows of all policies, with one sample and with `size`; the reference is first, the guided policy second."""
    reference, guided, *_ = policies
    single = plain(reference.name, reference.pools, 1, reference.rules[0])
    rivals: dict[str, list[Point]] = {
        rule.by: [plain(guided.name, guided.pools, n, rule) for n in range(1, size + 1)] for rule in guided.rules
    }
    return [
        Row(
            policy=policy,
            point=point,
            above_reference=gain(point, [single]),
            above_guided=None if policy is guided else gain(point, rivals[point.rule]),
        )
        for policy in policies
        for point in policy.points(size)
        if point.samples > 1 or point.rule == policy.rules[0].by
    ]


def markdown(rows: Sequence[Row], trainings: Sequence[Training]) -> str:
    """The rows, and the trainings."""
    head: tuple[str, ...] = (
        "policy", "n", "chosen by", "tokens", "accuracy", "above the reference", "above guided at as many tokens",
        "KL, nats", "training, s", "answers",
    )  # fmt: skip
    cells: list[tuple[object, ...]] = []
    for row in rows:
        point, (mean, se) = row.point, row.point.accuracy
        alone, kl = point.samples == 1, row.policy.divergence
        cells.append(
            (
                point.method, point.samples, "–" if alone else point.rule, f"{point.tokens:.0f}",
                f"{100 * mean:.1f} ± {100 * se:.1f} %", _points(row.above_reference),
                "" if row.above_guided is None else _points(row.above_guided),
                f"{kl.mean:.2f} ± {kl.se or 0:.2f}" if alone else "", f"{row.policy.seconds:.0f}", f"{point.answers:,}",
            )
        )  # fmt: skip
    made = table(head, cells)
    if not trainings:
        return made
    head = (
        "fine-tuning", "lr", "seed", "of", "steps", "passes", "loss", "s", "accuracy, n = 1", "KL by step, nats",
        "KL by log-ratio",
    )  # fmt: skip
    cells = [
        (
            one.tuning.method.upper(), f"{one.tuning.lr:g}", one.tuning.seed, f"{one.tuned.examples:,}",
            one.tuned.steps, f"{one.tuned.passes:.2f}", f"{one.tuned.loss:.3f}", f"{one.tuned.seconds:.0f}",
            f"{100 * one.policy.points(1)[0].accuracy[0]:.1f} %",
            f"{one.policy.divergence.mean:.3f} ± {one.policy.divergence.se or 0:.3f}",
            f"{one.log_ratio[0]:.3f} ± {one.log_ratio[1] or 0:.3f}",
        )
        for one in trainings
    ]  # fmt: skip
    return f"{made}\n\n{table(head, cells)}"


def data(rows: Sequence[Row], trainings: Sequence[Training]) -> dict[str, Any]:
    """All figures."""
    return {
        "rows": [
            {
                "policy": row.point.method, "samples": row.point.samples, "rule": row.point.rule,
                "tokens": row.point.tokens, "accuracy": row.point.accuracy[0], "accuracy_se": row.point.accuracy[1],
                "above_reference": row.above_reference, "above_guided": row.above_guided,
                "kl": asdict(row.policy.divergence) if row.point.samples == 1 else None,
                "training_seconds": row.policy.seconds, "problems": len(row.point.rewards),
                "answers": row.point.answers,
            }
            for row in rows
        ],
        "trainings": [
            {
                **asdict(one.tuning), **asdict(one.tuned), "accuracy": one.policy.points(1)[0].accuracy,
                "kl_by_step": asdict(one.policy.divergence), "kl_by_log_ratio": one.log_ratio,
            }
            for one in trainings
        ],
    }  # fmt: skip


def plot(path: Path, policies: Sequence[Policy], size: int) -> None:
    """Accuracy against tokens, against seconds of training, and against KL; bars are one standard error."""
    figure = Figure(figsize=(15, 5), dpi=140, layout="constrained")
    tokens, seconds, nats = figure.subplots(1, 3, sharey=True)
    points = [policy.points(size) for policy in policies]
    draw(tokens, [one for some in points for one in some])
    colours = colours_of([one for some in points for one in some])
    for policy, (single, *_) in zip(policies, points, strict=True):
        kl, colour = policy.divergence, colours[policy.name]
        _mark(seconds, policy.seconds, 0.0, single, colour)
        _mark(nats, kl.mean, kl.se or 0.0, single, colour)
    seconds.set_xlabel("seconds of training (one sample)")
    nats.set_xlabel("KL to the reference per completion, nats (one sample)")
    for axes in (seconds, nats):
        axes.set_ylabel("")
    figure.legend(*tokens.get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside right center")
    figure.savefig(path)


def _mark(axes: Axes, x: float, error: float, point: Point, colour: str) -> None:
    mean, se = point.accuracy
    axes.errorbar([x], [mean], xerr=[error], yerr=[se], color=colour, marker="o", markersize=5, capsize=2.5)
    of_accuracy(axes)


def _points(found: Gain) -> str:
    mean, se = found
    return f"{100 * mean:+.1f} ± {100 * se:.1f}"
