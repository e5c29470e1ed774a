"""What an evaluation's folder has kept of each problem, for statistics over several evaluations."""

import json
import statistics
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from trainer.evaluation.evaluate import SAMPLES


@dataclass(frozen=True)
class OfProblems:
    """Means over a setting's samples, by problem.

    Attributes:
        rewards: of the problems with a judged sample.
        kl: in nats.
    """

    rewards: Mapping[str, float]
    kl: Mapping[str, float]


def of_problems(out: Path, problems: Collection[str], most: int) -> dict[str, OfProblems]:
    """By the label of a setting.

    Args:
        out: folder of the evaluation.
        problems: ids of those that count.
        most: samples of each problem that count; an evaluation may once have asked for more.
    """
    samples: dict[str, dict[str, list[tuple[float | None, float]]]] = defaultdict(lambda: defaultdict(list))
    _, *entries = (out / SAMPLES).read_text().splitlines()
    for entry in map(json.loads, entries):
        if entry["problem"] in problems:
            found = [(one["reward"], one["kl"]) for one in entry["samples"]]
            samples[entry["setting"]][entry["problem"]] += found
    return {
        setting: OfProblems(
            rewards={
                name: statistics.fmean(some) for name, each in by_problem.items() if (some := _judged(each[:most]))
            },
            kl={name: statistics.fmean(kl for _, kl in each[:most]) for name, each in by_problem.items() if each},
        )
        for setting, by_problem in samples.items()
    }


def _judged(samples: list[tuple[float | None, float]]) -> list[float]:
    return [reward for reward, _ in samples if reward is not None]
