"""How good a critic is on prompts that it was not trained on: predictions at every valid position, and their report.

Averages weigh positions as the loss does, so that every rollout counts alike, however long.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from tqdm import tqdm

from qsharp_core.critic.model import Critic
from qsharp_core.returns import Bernoulli, ReturnDistribution
from trainer.training import measures
from trainer.training.batching import plan_epoch
from trainer.training.data import Rollout
from trainer.training.measures import Floats
from trainer.training.passes import Passes
from trainer.training.scorer import Scorer, outputs_of

PARTS = 5


@dataclass(frozen=True)
class Predictions:
    """A critic's opinion of every label `[L]`, sorted by rollout and position.

    Attributes:
        rollout: index of the label's rollout.
        part: its relative position, in fifths of the completion: 0 … 4.
        last: whether it is the completion's last token.
        branch: whether it is where a rollout leaves what it was given, the last token that is not its own choice.
        predicted: expected reward.
        losses: negative log-likelihood of the reward, in nats.
        rewards: what was earned.
        weights: 1 over each rollout.
    """

    rollout: NDArray[np.int64]
    part: NDArray[np.int64]
    last: NDArray[np.bool_]
    branch: NDArray[np.bool_]
    predicted: Floats
    losses: Floats
    rewards: Floats
    weights: Floats


@torch.inference_mode()
def predict(
    critic: Critic, rollouts: Sequence[Rollout], passes: Passes, accelerator: Accelerator, tokens: int = 65536
) -> Predictions:
    """Predictions of a critic on its device, shared between processes, in the precision of its weights.

    Args:
        tokens: how many tokens' rollouts the processes share at a time.
    """
    scorer = Scorer(critic).eval()
    found = []
    chunks = plan_epoch(rollouts, tokens, passes.trees, seed=0, epoch=0)
    main = accelerator.is_main_process
    for chunk in tqdm(chunks, desc="held-out", unit="batch", leave=False, disable=not main):
        for batch in (b.to(accelerator.device) for b in passes.batches(chunk, rollouts)):
            outputs_L = outputs_of(scorer, batch)
            losses = critic.distribution.loss(outputs_L, batch.rewards)
            columns = (batch.rollout, batch.position, critic.distribution.mean(outputs_L), losses)
            rows = torch.stack([c.double() for c in columns], dim=1)
            found.append(rows[batch.weights > 0])
    table = torch.cat(found)
    if accelerator.num_processes > 1:
        table = accelerator.gather(accelerator.pad_across_processes(table, dim=0, pad_index=-1))
        table = table[table[:, 0] >= 0]
    rollout, position, predicted, losses = table.cpu().numpy().T
    return predictions(rollout.astype(np.int64), position.astype(np.int64), predicted, losses, rollouts)


def predictions(
    rollout: NDArray[np.int64],
    position: NDArray[np.int64],
    predicted: Floats,
    losses: Floats,
    rollouts: Sequence[Rollout],
) -> Predictions:
    """From what a critic says of every label, in any order.

    Args:
        rollout: each label's index into `rollouts`.
        position: its place in the completion.
    """
    order = np.lexsort((position, rollout))
    rollout, position = rollout[order], position[order]
    lengths = np.array([len(r.completion) for r in rollouts])[rollout]
    first = np.array([r.first_valid for r in rollouts])[rollout]
    return Predictions(
        rollout=rollout,
        part=position * PARTS // lengths,
        last=position == lengths - 1,
        branch=(position == first) & (first > 0),
        predicted=predicted[order],
        losses=losses[order],
        rewards=np.array([r.reward for r in rollouts])[rollout],
        weights=1 / np.array([r.valid for r in rollouts])[rollout],
    )


def report(found: Predictions, rollouts: Sequence[Rollout], returns: ReturnDistribution) -> dict[str, Any]:
    """Log-loss, Brier, AUC and ECE with their `n`: overall, by fifth of the completion, at its last token, at branches.

    A branch is where guidance asks: which of the tokens that could stand there is the better one.
    """
    everything = np.ones(len(found.rollout), dtype=bool)
    by_position = [
        {"part": f"{part * 100 // PARTS}-{(part + 1) * 100 // PARTS}%"} | _measure(found, found.part == part, returns)
        for part in range(PARTS)
        if (found.part == part).any()
    ]
    return {
        "overall": _measure(found, everything, returns),
        "by_position": by_position,
        "last_token": _measure(found, found.last, returns),
        "branches": _measure(found, found.branch, returns) if found.branch.any() else None,
        "prompts": len({r.group for r in rollouts}),
    }


def _measure(found: Predictions, chosen: NDArray[np.bool_], returns: ReturnDistribution) -> dict[str, Any]:
    predicted, rewards, weights = found.predicted[chosen], found.rewards[chosen], found.weights[chosen]
    low, high = returns.reward_range
    mean = float(np.average(rewards, weights=weights))
    measured = {
        "n": int(chosen.sum()),
        "rollouts": len(np.unique(found.rollout[chosen])),
        "reward_mean": mean,
        "log_loss": float(np.average(found.losses[chosen], weights=weights)),
        "brier": measures.brier(predicted, rewards, weights),
        # "Won" is above the middle of the range: for rewards in {0, 1} that is 1.
        "auc": measures.auc(predicted, rewards > (low + high) / 2, weights),
        "ece": measures.ece(predicted, rewards, weights, (low, high)),
        # What the best constant would have, to compare with.
        "brier_constant": measures.brier(np.full_like(rewards, mean), rewards, weights),
    }
    if isinstance(returns, Bernoulli):
        measured["log_loss_constant"] = float(-sum(p * np.log(p) for p in (mean, 1 - mean) if p > 0))
    return measured


def compare(
    ours: Predictions, theirs: Predictions, rollouts: Sequence[Rollout], same_distribution: bool
) -> dict[str, Any]:
    """Whether a critic beats another on the same rollouts.

    By log-loss where both predict the same kind of distribution, else by squared error. `improvement` is theirs
    less ours, a mean over rollouts; its standard error takes a prompt's rollouts as one draw.
    """
    if same_distribution:
        differences = theirs.losses - ours.losses
    else:
        differences = (theirs.predicted - theirs.rewards) ** 2 - (ours.predicted - ours.rewards) ** 2
    per_rollout = np.bincount(ours.rollout, ours.weights * differences, len(rollouts)).astype(np.float64)
    _, prompts = np.unique([r.group for r in rollouts], return_inverse=True)
    mean, error = measures.clustered_mean(per_rollout, prompts)
    return {
        "by": "log_loss" if same_distribution else "squared_error",
        "improvement": mean,
        "standard_error": error,
        "prompts": len(np.unique(prompts)),
        "better": mean > 0,
    }
