"""What the answers say: pure functions on what was kept of them.

Answers to one problem share its difficulty, so standard errors are of a bootstrap over problems.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qsharp_core.residual import Step, bellman_residuals
from qsharp_core.wire.guidance import Tail
from trainer.training.measures import auc

Floats = NDArray[np.float64]
SEED = 0
RESAMPLES = 1000  # of the problems
DRAWS = 4000  # of answers, for each number of them
FALSE_ALARMS = MISSES = 0.05
MOST = 2000  # answers to notice something by
ALERTED = 200  # answers


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        deltas: its Bellman residuals, in reward.
        values: where the critic was asked.
        of_tail: tokens of these from outside the candidates.
        kl: in nats.
        ref_logprob: of all of it, in nats.
    """

    problem: str
    right: bool
    deltas: Floats
    values: Floats
    of_tail: int
    kl: float
    ref_logprob: float


def read(line: Mapping[str, Any], certain: float) -> Answer:
    """From a line of `sampling.sample`; `certain` as in `qsharp_core.residual`."""
    steps = [Step(nan if value is None else value, ref, pi) for value, ref, pi in line["tokens"]]
    return Answer(
        problem=line["problem"],
        right=line["reward"] == 1.0,
        deltas=np.array(bellman_residuals(steps, line["eta"], Tail.FLOOR, 0.0, certain)),
        values=np.array([step.value for step in steps if not isnan(step.value)]),
        of_tail=sum(step.value + line["eta"] * (step.logprob - step.ref_logprob) < 1e-9 for step in steps),
        kl=line["kl"],
        ref_logprob=sum(step.ref_logprob for step in steps),
    )


SCORES: dict[str, Callable[[Answer], float]] = {
    "V where the critic is first asked": lambda answer: float(answer.values[0]),
    "V where it is last asked": lambda answer: float(answer.values[-1]),
    "mean of delta": lambda answer: float(answer.deltas.mean()),
    "less mean of |delta|": lambda answer: -float(np.abs(answer.deltas).mean()),
    "less the number of steps that ask it": lambda answer: -float(len(answer.values)),
    "less KL": lambda answer: -answer.kl,
    "ln ref of the answer": lambda answer: answer.ref_logprob,
}
"""What an answer may be told by: more is to mean right."""


def tells(answers: Sequence[Answer], score: Callable[[Answer], float]) -> tuple[float, float]:
    """AUC of a score for right against wrong answers, and its standard error."""
    return _with_error(answers, lambda drawn: _auc([score(a) for a in drawn], [a.right for a in drawn]))


def mean_residual(answers: Sequence[Answer]) -> tuple[float, float]:
    """Mean of `|delta|` over all tokens, as Prometheus has it, and its standard error."""
    return _with_error(answers, lambda drawn: float(np.abs(np.concatenate([a.deltas for a in drawn])).mean()))


def higher(answers: Sequence[Answer], than: Sequence[Answer]) -> float:
    """P(the mean `|delta|` of one of `answers` is above that of one of `than`)."""
    both = [*answers, *than]
    return _auc([float(np.abs(a.deltas).mean()) for a in both], [True] * len(answers) + [False] * len(than))


def answers_to_notice(before: Sequence[Answer], after: Sequence[Answer]) -> int | None:
    """How many answers it takes to see, by their mean `|delta|`, that a critic is not the one from before.

    The mean of so many answers by the old critic lies between two bounds in 95 % of the draws, and that of as many by
    the new one outside in 95 %. None: `MOST` are not enough.
    """
    dice = np.random.default_rng(SEED)
    n = 1
    while n <= MOST:
        bounds = np.quantile(_means(before, n, dice), [FALSE_ALARMS / 2, 1 - FALSE_ALARMS / 2])
        drawn = _means(after, n, dice)
        if ((drawn < bounds[0]) | (drawn > bounds[1])).mean() >= 1 - MISSES:
            return n
        n = max(n + 1, round(1.1 * n))
    return None


def fires(before: Sequence[Answer], after: Sequence[Answer]) -> float:
    """How often `ResidualDrift` of docker/prometheus/rules.yml fires after `ALERTED` answers."""
    usual = float(np.abs(np.concatenate([a.deltas for a in before])).mean())
    ratios = _means(after, ALERTED, np.random.default_rng(SEED)) / usual
    return float(((ratios > 1.2) | (ratios < 0.5)).mean())


def _means(answers: Sequence[Answer], n: int, dice: np.random.Generator) -> Floats:
    sums = np.array([np.abs(a.deltas).sum() for a in answers])
    counts = np.array([len(a.deltas) for a in answers])
    drawn = dice.integers(len(answers), size=(DRAWS, n))
    found: Floats = sums[drawn].sum(1) / np.maximum(counts[drawn].sum(1), 1)
    return found


def _auc(scores: Sequence[float], won: Sequence[bool]) -> float:
    found = auc(np.array(scores), np.array(won), np.ones(len(scores)))
    return nan if found is None else found


def _with_error(answers: Sequence[Answer], figure: Callable[[Sequence[Answer]], float]) -> tuple[float, float]:
    by_problem: dict[str, list[Answer]] = {}
    for answer in answers:
        by_problem.setdefault(answer.problem, []).append(answer)
    groups, dice = list(by_problem.values()), np.random.default_rng(SEED)
    drawn = [
        figure([answer for i in dice.integers(len(groups), size=len(groups)) for answer in groups[i]])
        for _ in range(RESAMPLES)
    ]
    return figure(answers), float(np.std(drawn, ddof=1))
