"""Means over seeds, with how much seeds differ and how sure a mean is over problems: pure functions.

Two things make a figure uncertain: another seed would train another critic, and other problems would have been solved
more or less often. The standard deviation over seeds is of single trainings; the standard error over problems is of the
mean over these seeds. Both have in them that a problem was sampled a few times only.
"""

import math
import statistics
from collections.abc import Mapping, Sequence

from trainer.reports import ReportPart


class OverSeeds(ReportPart):
    """A figure of several trainings.

    Attributes:
        mean: over seeds.
        sd: standard deviation over seeds; None for a single one.
        se: standard error over problems; None for a single problem, or a figure that is not of problems.
    """

    mean: float
    sd: float | None
    se: float | None = None


def over_seeds(values: Sequence[Mapping[str, float]]) -> OverSeeds | None:
    """The mean of problems' values, of which each problem counts alike.

    Args:
        values: by problem, of each seed. Problems that a seed lacks are left out of all.

    Returns:
        None if there is no problem.
    """
    problems = sorted(set.intersection(*(set(one) for one in values)))
    if not problems:
        return None
    figures = spread([statistics.fmean(one[name] for name in problems) for one in values])
    of_problems = [statistics.fmean(one[name] for one in values) for name in problems]
    se = statistics.stdev(of_problems) / math.sqrt(len(problems)) if len(problems) > 1 else None
    return figures.model_copy(update={"se": se})


def spread(values: Sequence[float]) -> OverSeeds:
    """The mean and the standard deviation of a figure that each seed has once."""
    return OverSeeds(mean=statistics.fmean(values), sd=statistics.stdev(values) if len(values) > 1 else None)


def means(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Each problem's mean over all that have it."""
    of_problem: dict[str, list[float]] = {}
    for one in values:
        for name, value in one.items():
            of_problem.setdefault(name, []).append(value)
    return {name: statistics.fmean(some) for name, some in of_problem.items()}


def differences(ours: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, float]:
    """Ours less theirs, of the problems that both have."""
    return {name: ours[name] - theirs[name] for name in ours if name in theirs}
