"""Accuracy against generated tokens, of plain samples and of searches: pure functions on what was sampled."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qsharp_core.answers import VoteName
from qsharp_core.wire.search import Best
from server.request.search.ranking import ranked


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A completion.

    Attributes:
        text: of it.
        reward: what it earned.
        estimate: the reward that the critic expects after its last token; None if it was never asked.
        tokens: generated for it; of what a search returned, those of the whole search.
        kl: divergence from the reference in nats over its own tokens, as the server reports it; None without guidance.
        token_ids: of prompt and completion, the last `tokens` are the completion's; None where a critic guided.
    """

    text: str
    reward: float
    estimate: float | None
    tokens: int
    kl: float | None = None
    token_ids: list[int] | None = None


@dataclass(frozen=True)
class Point:
    """What one way of spending tokens reaches.

    Attributes:
        method, rule: how completions are sampled, and how one is chosen among them.
        samples: so many are sampled for each answer.
        tokens: generated for each answer, the mean.
        rewards: of the answers to each problem, the mean, `[P]`; problems are in the same order in all points.
        answers: how many there are.
    """

    method: str
    rule: str
    samples: int
    tokens: float
    rewards: NDArray[np.float64]
    answers: int

    @property
    def accuracy(self) -> tuple[float, float]:
        """The mean over problems and its standard error."""
        return float(self.rewards.mean()), _error(self.rewards)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How the best of several samples is found; see `ranked`."""

    by: Best
    vote: VoteName
    reward_range: tuple[float, float]

    def best(self, samples: Sequence[Sample]) -> Sample:
        """One of the samples, as the server's `best_of` finds it."""
        texts, estimates = [one.text for one in samples], [one.estimate for one in samples]
        return samples[ranked(self.by, texts, estimates, vote=self.vote, reward_range=self.reward_range)[0]]


def plain(method: str, pools: Mapping[str, Sequence[Sequence[Sample]]], size: int, rule: Rule) -> Point:
    """The best of each `size` samples.

    Args:
        method: how they were sampled.
        pools: of each problem, some pools of independent samples; each is dealt into groups of `size`.
        size: samples of an answer.
        rule: finds the best of a group.
    """
    groups = {
        problem: [pool[i : i + size] for pool in some for i in range(0, len(pool) - size + 1, size)]
        for problem, some in pools.items()
    }
    rewards = [statistics.fmean(rule.best(group).reward for group in dealt) for dealt in groups.values()]
    spent = [sum(one.tokens for one in group) for dealt in groups.values() for group in dealt]
    return Point(method, rule.by, size, statistics.fmean(spent), np.array(rewards), len(spent))


def searched(method: str, rule: str, size: int, answers: Mapping[str, Sequence[Sample]]) -> Point:
    """What searches of `size` samples returned for each problem."""
    rewards = [statistics.fmean(one.reward for one in found) for found in answers.values()]
    spent = [one.tokens for found in answers.values() for one in found]
    return Point(method, rule, size, statistics.fmean(spent), np.array(rewards), len(spent))


def gain(point: Point, others: Sequence[Point]) -> tuple[float, float]:
    """What a point has above others at as many tokens, paired by problem, and its standard error.

    Between two of the others' points lies a line, over the logarithm of tokens; beyond the last one counts that one.
    """
    others = sorted(others, key=lambda other: other.tokens)
    at = [math.log(other.tokens) for other in others]
    shares = np.array([np.interp(math.log(point.tokens), at, row) for row in np.eye(len(others))])
    differences = point.rewards - shares @ np.stack([other.rewards for other in others])
    return float(differences.mean()), _error(differences)


def _error(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
