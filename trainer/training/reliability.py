"""Whether what a critic expects comes true: predictions in bins, and what was earned in each."""

from dataclasses import dataclass

import numpy as np

from trainer.training import measures
from trainer.training.heldout import Predictions

BINS = 10


@dataclass(frozen=True)
class ReliabilityBin:
    """Predictions of similar size.

    Attributes:
        predicted: their weighted mean.
        earned: the weighted mean reward.
        error: standard error of `earned`, where the positions of a rollout count as one draw; 0 for a single rollout.
    """

    predicted: float
    earned: float
    error: float


def reliability(predictions: Predictions, bins: int = BINS) -> list[ReliabilityBin]:
    """Bins of equal weight, so that each is as trustworthy as the next, in the order of the predictions."""
    order = np.argsort(predictions.predicted, kind="stable")
    share = np.cumsum(predictions.weights[order]) / predictions.weights.sum()
    where = np.minimum((share * bins).astype(int), bins - 1)
    found = []
    for b in np.unique(where):
        chosen = order[where == b]
        weights, rewards = predictions.weights[chosen], predictions.rewards[chosen]
        earned = float(np.average(rewards, weights=weights))
        # Positions of one rollout share its reward: a rollout is a draw, not a position.
        total = np.bincount(predictions.rollout[chosen], weights)
        of_rollouts = np.bincount(predictions.rollout[chosen], weights * rewards)
        seen = total > 0
        _, error = measures.clustered_mean(
            (of_rollouts[seen] - earned * total[seen]) / total[seen].mean(), np.arange(int(seen.sum()))
        )
        predicted = float(np.average(predictions.predicted[chosen], weights=weights))
        found.append(ReliabilityBin(predicted, earned, error or 0.0))
    return found
