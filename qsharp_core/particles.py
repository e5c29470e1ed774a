"""Twisted sequential Monte Carlo over completions: the arithmetic of weights. Pure functions on numbers.

docs/method.md ("Search") has the derivation. A particle is a path of tokens. It is drawn by the guided policy `pi`, and
aims, at a prefix `x` whose value is known, at `ref(x) · exp(V(x) / eta)`. From such a prefix `x_i` to the next one,
`x_j`, its weight grows by

    [V(x_j) - V(x_i)] / eta - Σ_{k = i}^{j - 1} ln pi(x_k)/ref(x_k)

which is 0 for a critic that agrees with itself. A value is known *before* a token, so the tokens since the last known
one wait. At the end of a completion they count as they were drawn: then the critic's prediction for the last token that
it was asked about stands for the reward.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol


class ReportedStep(Protocol):
    """What is known of one token.

    Attributes:
        value: `V` of the prefix before it, in units of reward; NaN where the critic was not asked.
        ref_logprob, logprob: `ln ref` and `ln pi` of the token.
    """

    @property
    def value(self) -> float: ...
    @property
    def ref_logprob(self) -> float: ...
    @property
    def logprob(self) -> float: ...


@dataclass
class PathWeight:
    """The weight of one path.

    Attributes:
        log_weight: since the particles were last resampled, or since they began.
        twist: `V / eta` at the last prefix whose value is known, which the weight reaches up to.
        asked: whether there is such a prefix.
        waiting: `ln pi/ref` of the tokens since then.
    """

    log_weight: float = 0.0
    twist: float = 0.0
    asked: bool = False
    waiting: float = 0.0

    def take(self, steps: Iterable[ReportedStep], eta: float) -> None:
        """Adds the path's next tokens."""
        for step in steps:
            if not math.isnan(step.value):
                twist = step.value / eta
                self.log_weight += twist - self.twist - self.waiting
                self.twist, self.asked, self.waiting = twist, True, 0.0
            self.waiting += step.logprob - step.ref_logprob


class Weights:
    """The weights of all particles.

    A particle of which the critic has not been asked yet counts as the mean of those of which it has.

    Args:
        particles: how many there are.
        eta: strength of the guidance, in units of reward.

    Attributes:
        resamplings: how often they were resampled.
    """

    def __init__(self, particles: int, eta: float) -> None:
        self._eta = eta
        self._paths = [PathWeight() for _ in range(particles)]
        self._log_norm = 0.0  # of the weights before the last resampling
        self.resamplings = 0

    def take(self, particle: int, steps: Iterable[ReportedStep]) -> None:
        """Adds a particle's next tokens."""
        self._paths[particle].take(steps, self._eta)

    @property
    def logs(self) -> list[float]:
        """Log weights, of which only differences matter."""
        self._settle()
        return [path.log_weight for path in self._paths]

    @property
    def relative(self) -> list[float]:
        """The weights as shares of the largest."""
        return _relative(self.logs)

    @property
    def log_estimate(self) -> float | None:
        """The estimate of `ln E_ref[exp(reward / eta)]`; None if the critic was never asked."""
        if not any(path.asked for path in self._paths):
            return None
        return self._log_norm + log_mean_exp(self.logs)

    def resample(self, below: float, uniform: float) -> list[int] | None:
        """Draws the particles anew if their effective share is below a limit.

        Args:
            below: the limit, a share of the particles.
            uniform: drawn from `[0, 1)`.

        Returns:
            For each particle which one it now goes on from; None if they stay.
        """
        logs = self.logs
        if effective_share(logs) >= below:
            return None
        ancestors = systematic(logs, len(logs), uniform)
        self._log_norm += log_mean_exp(logs)
        self._paths = [replace(self._paths[ancestor], log_weight=0.0) for ancestor in ancestors]
        self.resamplings += 1
        return ancestors

    def _settle(self) -> None:
        known = [path.log_weight for path in self._paths if path.asked]
        if not known:
            return
        mean = log_mean_exp(known)
        for path in self._paths:
            if not path.asked:
                path.log_weight, path.twist = mean, self._log_norm + mean


def log_mean_exp(logs: Sequence[float]) -> float:
    """`ln` of the mean of `exp(logs)`."""
    highest = max(logs)
    return highest + math.log(math.fsum(math.exp(log - highest) for log in logs) / len(logs))


def effective_share(log_weights: Sequence[float]) -> float:
    """The effective sample size, `(Σ w)² / Σ w²`, as a share of the number of weights: from 1/N to 1."""
    weights = _relative(log_weights)
    return math.fsum(weights) ** 2 / math.fsum(weight * weight for weight in weights) / len(weights)


def systematic(log_weights: Sequence[float], draws: int, uniform: float) -> list[int]:
    """Systematic resampling: indices in ascending order, each `draws · weight` times, rounded up or down.

    Args:
        log_weights: need not be normalised.
        draws: how many indices.
        uniform: drawn from `[0, 1)`.
    """
    weights = _relative(log_weights)
    spacing = math.fsum(weights) / draws
    last = max(i for i, weight in enumerate(weights) if weight > 0)  # rounding may leave `at` beyond all of them
    drawn: list[int] = []
    reached, index = weights[0], 0
    for draw in range(draws):
        at = (draw + uniform) * spacing
        while reached <= at and index < last:
            index += 1
            reached += weights[index]
        drawn.append(index)
    return drawn


def _relative(log_weights: Sequence[float]) -> list[float]:
    highest = max(log_weights)
    return [math.exp(log - highest) for log in log_weights]
