"""Which of two versions earns more, by rewards of live traffic: a test that may be looked at after every reward.

The bounds are an asymptotic confidence sequence (Waudby-Smith, Arbour, Sinha, Kennedy, Ramdas, "Time-uniform central
limit theory and asymptotic confidence sequences", Annals of Statistics 2024; the boundary is Robbins' normal mixture):
with probability 1 - alpha the true difference of means is within them at all times together. So one may stop at the
first time that they exclude 0, and errs with probability alpha at most.

Each reward becomes an unbiased estimate of the difference (augmented inverse-probability weighting), whatever share of
the traffic the trial had at its time:

    phi = m1 - m0 + 1[trial] (r - m1) / s - 1[active] (r - m0) / (1 - s)

with `s` the trial's share and `m1`, `m0` the means of both arms' earlier rewards.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEAST = 100  # rewards of each arm before anything is decided: the bounds are asymptotic
TIGHTEST = 500  # rewards of both arms together at which the bounds are tightest, for their size
Floats = NDArray[np.float64]
Verdict = Literal["better", "worse", "undecided"]


@dataclass(frozen=True)
class RewardComparison:
    """What rewards say of a trial.

    Attributes:
        verdict: whether the trial earns more than the active version, or less.
        n: rewards of the trial, and of the active version, that it rests on.
        means: mean rewards of the two.
        difference: estimate of the trial's gain in mean reward.
        low, high: bounds of the gain.
        alpha: the probability that the bounds ever exclude the true gain, at most.
    """

    verdict: Verdict
    n: tuple[int, int]
    means: tuple[float, float]
    difference: float
    low: float
    high: float
    alpha: float


def compare(trial: ArrayLike, rewards: ArrayLike, shares: ArrayLike, alpha: float = 0.05) -> RewardComparison:
    """Looks at all rewards so far, in the order in which they came. Further ones may be added and looked at again.

    Args:
        trial: for each reward whether the trial guided its rollout, `[T]`.
        rewards: `[T]`.
        shares: of the traffic that the trial had when the rollout was sampled, strictly between 0 and 1, `[T]`.
        alpha: probability of a wrong verdict, however often one looks.

    Raises:
        ValueError: a share is 0 or 1.
    """
    arms, values, taken = np.asarray(trial, dtype=bool), np.asarray(rewards, float), np.asarray(shares, float)
    if np.any((taken <= 0) | (taken >= 1)):
        raise ValueError("shares must be between 0 and 1")
    n = (int(arms.sum()), int((~arms).sum()))
    means = (_mean(values[arms]), _mean(values[~arms]))
    if min(n) < LEAST:
        return RewardComparison("undecided", n, means, means[0] - means[1], -math.inf, math.inf, alpha)
    phi = _estimates(arms, values, taken)
    difference, spread, count = float(phi.mean()), float(phi.std()), len(phi)
    width = spread * _radius(count, alpha)
    low, high = difference - width, difference + width
    verdict: Verdict = "better" if low > 0 else "worse" if high < 0 else "undecided"
    return RewardComparison(verdict, n, means, difference, low, high, alpha)


def _estimates(arms: NDArray[np.bool_], values: Floats, shares: Floats) -> Floats:
    """`phi` of each reward, `[T]`."""
    first, second = _earlier_means(arms, values), _earlier_means(~arms, values)
    weighted = np.where(arms, (values - first) / shares, -(values - second) / (1 - shares))
    return first - second + weighted


def _earlier_means(chosen: NDArray[np.bool_], values: Floats) -> Floats:
    """Before each place the mean of the chosen values so far, `[T]`; 0 where there are none."""
    count = np.concatenate([[0], np.cumsum(chosen)[:-1]])
    total = np.concatenate([[0.0], np.cumsum(np.where(chosen, values, 0.0))[:-1]])
    return total / np.maximum(count, 1)


def _radius(count: int, alpha: float) -> float:
    """Half the width of the bounds, for a standard deviation of 1."""
    rho = (-2 * math.log(alpha) + math.log(-2 * math.log(alpha)) + 1) / TIGHTEST  # rho squared
    scaled = count * rho + 1
    return math.sqrt(scaled / (count**2 * rho) * (math.log(scaled) - 2 * math.log(alpha)))


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else math.nan
