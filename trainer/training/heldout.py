"""How good a critic is on prompts that it was not trained on: predictions at every valid position, and their measures.

Averages weigh positions as the loss does, so that every rollout counts alike, however long it is.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from qsharp_core.returns import Categorical, ReturnDistribution
from trainer.training import measures
from trainer.training.measures import Floats
from trainer.training.report import Comparison, HeldOutReport, Measures, PositionMeasures
from trainer.training.rollouts import Rollouts

PARTS = 5


@dataclass(frozen=True)
class Predictions:
    """A critic's predictions at L labels, sorted by rollout and position. All arrays are `[L]`.

    Attributes:
        rollout: index of the label's rollout.
        part: which fifth of the completion the label's position is in: 0 … 4.
        last: whether the position is the completion's last token.
        branch: whether the position is where a rollout begins to be the reference's own: the last token of a roll-in,
            or the forced token of a branch.
        predicted: the expected reward.
        losses: negative log-likelihood of the reward, in nats.
        rewards: the reward that was earned.
        weights: what each label counts; the weights of a rollout sum to 1.
    """

    rollout: NDArray[np.int64]
    part: NDArray[np.int64]
    last: NDArray[np.bool_]
    branch: NDArray[np.bool_]
    predicted: Floats
    losses: Floats
    rewards: Floats
    weights: Floats


def predictions(
    rollout: NDArray[np.int64],
    position: NDArray[np.int64],
    predicted: Floats,
    losses: Floats,
    rollouts: Rollouts,
) -> Predictions:
    """Puts a critic's predictions in order. All arrays are `[L]`, in any order of the labels.

    Args:
        rollout: each label's index into `rollouts`.
        position: each label's position in the completion.
        predicted: the expected rewards.
        losses: negative log-likelihoods of the rewards, in nats.
        rollouts: what was predicted.
    """
    order = np.lexsort((position, rollout))
    rollout, position = rollout[order], position[order]
    lengths, first = rollouts.completions[rollout], rollouts.first_valid[rollout]
    return Predictions(
        rollout=rollout,
        part=position * PARTS // lengths,
        last=position == lengths - 1,
        branch=(position == first) & (first > 0),
        predicted=predicted[order],
        losses=losses[order],
        rewards=rollouts.rewards[rollout],
        weights=1 / rollouts.valid[rollout],
    )


def report(measured: Predictions, rollouts: Rollouts, returns: ReturnDistribution) -> HeldOutReport:
    """Measures of the predictions: overall, by fifth of the completion, at its last token, and at branches.

    Branches show what guidance asks: which of the tokens that could stand at a place is the better one.
    """
    by_position = [
        PositionMeasures(
            part=f"{part * 100 // PARTS}-{(part + 1) * 100 // PARTS}%",
            **_measure(measured, measured.part == part, returns).model_dump(),
        )
        for part in range(PARTS)
        if (measured.part == part).any()
    ]
    return HeldOutReport(
        overall=_measure(measured, np.ones(len(measured.rollout), dtype=bool), returns),
        by_position=by_position,
        last_token=_measure(measured, measured.last, returns),
        branches=_measure(measured, measured.branch, returns) if measured.branch.any() else None,
        prompts=len(np.unique(rollouts.groups)),
    )


def _measure(measured: Predictions, chosen: NDArray[np.bool_], returns: ReturnDistribution) -> Measures:
    predicted, rewards, weights = measured.predicted[chosen], measured.rewards[chosen], measured.weights[chosen]
    low, high = returns.reward_range
    mean = float(np.average(rewards, weights=weights))
    return Measures(
        n=int(chosen.sum()),
        rollouts=len(np.unique(measured.rollout[chosen])),
        reward_mean=mean,
        log_loss=float(np.average(measured.losses[chosen], weights=weights)),
        brier=measures.brier(predicted, rewards, weights),
        # "Won" is above the middle of the range: for rewards in {0, 1} that is 1.
        auc=measures.auc(predicted, rewards > (low + high) / 2, weights),
        ece=measures.ece(predicted, rewards, weights, (low, high)),
        brier_constant=measures.brier(np.full_like(rewards, mean), rewards, weights),
        log_loss_constant=_constant_log_loss(rewards, weights, returns),
    )


def _constant_log_loss(rewards: Floats, weights: Floats, returns: ReturnDistribution) -> float:
    """The least log-loss that one distribution for all positions can have, in nats: an entropy."""
    if isinstance(returns, Categorical):
        masses = np.average(returns.two_hot(torch.from_numpy(rewards)).numpy(), axis=0, weights=weights)
    else:
        mean = float(np.average(rewards, weights=weights))
        masses = np.array([mean, 1 - mean])
    return abs(float(sum(p * np.log(p) for p in masses if p > 0)))


def compare(ours: Predictions, theirs: Predictions, rollouts: Rollouts, same_distribution: bool) -> Comparison:
    """Whether a critic's predictions are better than another critic's on the same rollouts.

    Args:
        ours: the predictions of the new critic.
        theirs: the predictions of the critic that it is compared with.
        rollouts: what both predicted.
        same_distribution: whether both predict the same kind of distribution: then they are compared by log-loss, else
            by squared error.
    """
    if same_distribution:
        differences = theirs.losses - ours.losses
    else:
        differences = (theirs.predicted - theirs.rewards) ** 2 - (ours.predicted - ours.rewards) ** 2
    per_rollout = np.bincount(ours.rollout, ours.weights * differences, len(rollouts)).astype(np.float64)
    _, prompts = np.unique(rollouts.groups, return_inverse=True)
    mean, error = measures.clustered_mean(per_rollout, prompts)
    return Comparison(
        by="log_loss" if same_distribution else "squared_error",
        improvement=mean,
        standard_error=error,
        prompts=len(np.unique(prompts)),
        better=mean > 0,
    )
