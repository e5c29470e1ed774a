"""Statistics of an evaluation: pure functions on what each problem's samples earned.

Samples of one problem are not independent, because they share its difficulty. So a problem counts as one draw, and all
standard errors are over problems.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from trainer.evaluation.report import Figures, MeanReward

BEST: Final = "best_of"
ORACLE: Final = "oracle"


@dataclass(frozen=True, kw_only=True)
class JudgedSample:
    """A completion and what it earned.

    Attributes:
        reward: None if the completion could not be judged.
        kl: KL divergence to the reference in nats, over the completion.
        tokens: tokens of the completion; of one that a search has found, those of all samples of the search.
        vote: the answer that the completion gives; None is no vote.
        score: the reward that the critic expects after the last token; None if the critic was not asked.
    """

    reward: float | None
    kl: float
    tokens: int
    vote: str | None = None
    score: float | None = None


@dataclass(frozen=True)
class Estimate:
    """A mean over problems, its standard error (None for a single problem), and the number of problems."""

    mean: float
    se: float | None
    problems: int


def estimate(values: Sequence[float]) -> Estimate | None:
    """The mean of one value for each problem; None if there are no problems."""
    if not values:
        return None
    se = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(statistics.fmean(values), se, len(values))


def expected_best(keys: Sequence[float], values: Sequence[float], k: int) -> float:
    """The expected value of the sample with the greatest key among `k` samples, where ties are broken at random.

    The expectation is exact, over all subsets of size `k`. If the values are the keys, it is the expected maximum; for
    rewards in {0, 1} that is the unbiased pass@k.
    """
    assert 1 <= k <= len(keys) == len(values)
    of_key: dict[float, list[float]] = {}
    for key, value in zip(keys, values, strict=True):
        of_key.setdefault(key, []).append(value)
    total, below = 0.0, 0
    for key in sorted(of_key):
        # P(the greatest is of this key) = (C(below + these, k) − C(below, k)) / C(n, k); which of them, is a toss-up.
        group = of_key[key]
        ways = math.comb(below + len(group), k) - math.comb(below, k)
        total += ways / math.comb(len(keys), k) * statistics.fmean(group)
        below += len(group)
    return total


def majority(votes: Sequence[str | None], rewards: Sequence[float], weights: Sequence[float] | None = None) -> float:
    """The reward of the answer with the most votes, or the most weight.

    An answer's reward is the mean of its samples' rewards. Of answers that tie the mean is taken, which is what a
    random choice among them earns on average. Samples without a vote abstain; if all of them do, the result is the mean
    of all rewards.
    """
    assert len(votes) == len(rewards) > 0
    weight_of: dict[str, float] = {}
    rewards_of: dict[str, list[float]] = {}
    for vote, reward, weight in zip(votes, rewards, weights or [1.0] * len(votes), strict=True):
        if vote is not None:
            weight_of[vote] = weight_of.get(vote, 0.0) + weight
            rewards_of.setdefault(vote, []).append(reward)
    if not weight_of:
        return statistics.fmean(rewards)
    most = max(weight_of.values())
    return statistics.fmean(statistics.fmean(rewards_of[vote]) for vote, weight in weight_of.items() if weight == most)


def sizes(samples: int) -> list[int]:
    """The numbers k that best-of-k is reported for: powers of two below the number of samples, and that number."""
    powers = [2**i for i in range(samples.bit_length()) if 2**i < samples]
    return [*powers, samples]


def summary(
    problems: Mapping[str, Sequence[JudgedSample]],
    reference: Mapping[str, Sequence[JudgedSample]],
    samples: int,
    least_reward: float = 0.0,
    voted: bool = True,
) -> Figures:
    """The figures of one setting.

    Args:
        problems: the setting's samples, by problem.
        reference: the reference's samples, by problem; gains are paired with them.
        samples: the number of samples of each problem that was asked for. Majorities and best-of-k leave out problems
            with an unjudged sample, because they take all of a problem's samples.
        least_reward: the least reward there can be; what a score exceeds it by is a vote's weight.
        voted: whether there are votes that majorities count; free texts have none.
    """
    accuracy, baseline = pass_at_1(problems), pass_at_1(reference)
    sampled = [group for group in problems.values() if group]
    judged = [[sample for sample in group if sample.reward is not None] for group in sampled]
    whole = [group for group in judged if len(group) == samples]
    scored = [group for group in whole if all(sample.score is not None for sample in group)]
    rewards = [_rewards(group) for group in whole]
    scores = [[sample.score for sample in group if sample.score is not None] for group in scored]
    pairs = list(zip(scores, map(_rewards, scored), strict=True))
    by_k: dict[Literal["oracle", "best_of"], dict[int, list[float]]] = {
        ORACLE: {k: [expected_best(r, r, k) for r in rewards] for k in sizes(samples)},
        BEST: {k: [expected_best(keys, r, k) for keys, r in pairs] for k in sizes(samples)},
    }
    votes = [[sample.vote for sample in group] for group in whole]
    weighted = [
        majority([sample.vote for sample in group], r, [key - least_reward for key in keys])
        for group, (keys, r) in zip(scored, pairs, strict=True)
    ]
    return Figures(
        problems=len(accuracy),
        n=sum(map(len, judged)),
        unjudged=sum(map(len, sampled)) - sum(map(len, judged)),
        by_k={name: {str(k): MeanReward(**_figure("mean", v)) for k, v in of_k.items()} for name, of_k in by_k.items()},
        **_figure("accuracy", list(accuracy.values())),
        **_figure("gain", [accuracy[name] - baseline[name] for name in accuracy if name in baseline]),
        **_figure("full", [statistics.fmean(s.reward == 1 for s in group) for group in judged if group]),
        **_figure("kl", [statistics.fmean(sample.kl for sample in group) for group in sampled]),
        **_figure("tokens", [statistics.fmean(sample.tokens for sample in group) for group in sampled]),
        **_figure("majority", [majority(v, r) for v, r in zip(votes, rewards, strict=True)] if voted else []),
        **_figure("weighted_majority", weighted if voted else []),
        **_figure(ORACLE, by_k[ORACLE][samples]),
        **_figure(BEST, by_k[BEST][samples]),
    )


def pass_at_1(problems: Mapping[str, Sequence[JudgedSample]]) -> dict[str, float]:
    """The mean reward of each problem's judged samples, by problem; problems without one are left out."""
    rewards = {name: _rewards(group) for name, group in problems.items()}
    return {name: statistics.fmean(values) for name, values in rewards.items() if values}


def _rewards(samples: Sequence[JudgedSample]) -> list[float]:
    return [sample.reward for sample in samples if sample.reward is not None]


def _figure(name: str, values: Sequence[float]) -> dict[str, Any]:
    mean = estimate(values)
    return {name: mean.mean if mean else None, f"{name}_se": mean.se if mean else None}
