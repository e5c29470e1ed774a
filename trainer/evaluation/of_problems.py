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
    """By the label of a setting. If a problem's text has changed meanwhile, the samples of the newest one count.

    Args:
        out: folder of the evaluation.
        problems: ids of those that count.
        most: samples of each problem that count; an evaluation may once have asked for more.
    """
    kept: dict[str, dict[str, dict[str, list[tuple[float | None, float]]]]] = defaultdict(lambda: defaultdict(dict))
    _, *entries = (out / SAMPLES).read_text().splitlines()
    for entry in map(json.loads, entries):
        if entry["problem"] in problems:
            found = [(one["reward"], one["kl"]) for one in entry["samples"]]
            texts = kept[entry["setting"]][entry["problem"]]
            texts[entry["item"]] = texts.pop(entry["item"], []) + found  # the newest is the last
    return {
        setting: _means({name: [*texts.values()][-1][:most] for name, texts in by_problem.items()})
        for setting, by_problem in kept.items()
    }


def _means(samples: Mapping[str, list[tuple[float | None, float]]]) -> OfProblems:
    return OfProblems(
        rewards={name: statistics.fmean(judged) for name, each in samples.items() if (judged := _judged(each))},
        kl={name: statistics.fmean(kl for _, kl in each) for name, each in samples.items() if each},
    )


def _judged(samples: list[tuple[float | None, float]]) -> list[float]:
    return [reward for reward, _ in samples if reward is not None]
