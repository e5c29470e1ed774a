"""Statistics of an evaluation: pure functions on what each problem's samples earned.

Samples of one problem share its difficulty, so a problem is a draw, and standard errors are over problems.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BEST, ORACLE, MAJORITY, WEIGHTED = "best_of", "oracle", "majority", "weighted_majority"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A judged completion.

    Attributes:
        reward: None if it could not be judged.
        kl: in nats, over the completion.
        vote: the answer it stands for; None is no vote.
        score: the reward that the critic expects after its last token; None if it was not asked.
    """

    reward: float | None
    kl: float
    tokens: int
    vote: str | None = None
    score: float | None = None


@dataclass(frozen=True)
class Estimate:
    """A mean over problems, its standard error (None for a single problem), and how many there were."""

    mean: float
    se: float | None
    problems: int


def estimate(values: Sequence[float]) -> Estimate | None:
    """Of one value a problem; None if there is none."""
    if not values:
        return None
    se = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(statistics.fmean(values), se, len(values))


def expected_best(keys: Sequence[float], values: Sequence[float], k: int) -> float:
    """The expected value of that of `k` samples with the greatest key, ties broken at random.

    Exact over all subsets of size `k`, which are equally likely. With the values as keys it is the expected maximum,
    for rewards in {0, 1} the unbiased pass@k.
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
    """The reward of the answer with most votes, or most weight; the mean of those that tie, as if broken at random.

    An answer's reward is the mean of its samples'. Samples without a vote abstain; if all do, it is a sample's mean.
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
    """For best-of-k: powers of two, and all."""
    powers = [2**i for i in range(samples.bit_length()) if 2**i < samples]
    return [*powers, samples]


def summary(
    problems: Mapping[str, Sequence[Sample]],
    reference: Mapping[str, Sequence[Sample]],
    samples: int,
    least_reward: float = 0.0,
) -> dict[str, Any]:
    """What one setting did, as JSON's data: each figure with its standard error as `…_se`, null where there is none.

    Args:
        problems: its samples by problem.
        reference: those of the reference, which gains are measured against, problem by problem.
        samples: of each problem, as asked for; what takes all of them leaves out problems with unjudged ones.
        least_reward: scores above it are the weights of a weighted majority.
    """
    own, base = pass_at_1(problems), pass_at_1(reference)
    everything = [given for given in problems.values() if given]
    judged = [[s for s in given if s.reward is not None] for given in everything]
    whole = [given for given in judged if len(given) == samples]
    scored = [given for given in whole if all(s.score is not None for s in given)]
    rewards = [_rewards(given) for given in whole]
    scores = [[s.score for s in given if s.score is not None] for given in scored]
    pairs = list(zip(scores, map(_rewards, scored), strict=True))
    by_k = {
        ORACLE: {k: [expected_best(r, r, k) for r in rewards] for k in sizes(samples)},
        BEST: {k: [expected_best(keys, r, k) for keys, r in pairs] for k in sizes(samples)},
    }
    votes = [[s.vote for s in given] for given in whole]
    weighted = [
        majority([s.vote for s in given], r, [key - least_reward for key in keys])
        for given, (keys, r) in zip(scored, pairs, strict=True)
    ]
    return {
        "problems": len(own),
        "n": sum(map(len, judged)),
        "unjudged": sum(map(len, everything)) - sum(map(len, judged)),
        **_figure("accuracy", list(own.values())),
        **_figure("gain", [own[name] - base[name] for name in own if name in base]),
        **_figure("kl", [statistics.fmean(s.kl for s in given) for given in everything]),
        **_figure("tokens", [statistics.fmean(s.tokens for s in given) for given in everything]),
        **_figure(MAJORITY, [majority(v, r) for v, r in zip(votes, rewards, strict=True)]),
        **_figure(WEIGHTED, weighted),
        **{key: value for name in by_k for key, value in _figure(name, by_k[name][samples]).items()},
        "by_k": {name: {str(k): _figure("mean", values) for k, values in of.items()} for name, of in by_k.items()},
    }


def pass_at_1(problems: Mapping[str, Sequence[Sample]]) -> dict[str, float]:
    """By problem, the mean reward of its judged samples; problems without one are left out."""
    rewards = {name: [s.reward for s in given if s.reward is not None] for name, given in problems.items()}
    return {name: statistics.fmean(given) for name, given in rewards.items() if given}


def _rewards(samples: Sequence[Sample]) -> list[float]:
    return [sample.reward for sample in samples if sample.reward is not None]


def _figure(name: str, values: Sequence[float]) -> dict[str, float | None]:
    found = estimate(values)
    return {name: found.mean if found else None, f"{name}_se": found.se if found else None}
