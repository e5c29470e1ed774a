"""What each problem earned and cost under a setting, for statistics over several evaluations."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainer.evaluation.settings import Setting
from trainer.evaluation.statistics import JudgedSample, pass_at_1


@dataclass(frozen=True)
class OfProblems:
    """Means over a setting's samples, by problem.

    Attributes:
        rewards: of the problems with a judged sample.
        kl: in nats.
    """

    rewards: Mapping[str, float]
    kl: Mapping[str, float]


def of_problems(samples: Mapping[Setting, Mapping[str, Sequence[JudgedSample]]]) -> dict[Setting, OfProblems]:
    """What each problem earned and cost, by setting; `samples` are by setting and problem."""
    return {
        setting: OfProblems(
            rewards=pass_at_1(problems),
            kl={name: statistics.fmean(sample.kl for sample in group) for name, group in problems.items() if group},
        )
        for setting, problems in samples.items()
    }
