"""The labels of rollouts on distinct prefixes.

A node is a token after its prefix. A head's outputs at a node are the same for all rollouts through it. A likelihood is
linear in the reward, so a node whose target is the mean of its rollouts has their loss and gradient.

Shapes: M nodes, L labels (one for each valid position of each rollout).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qsharp_core.returns import Categorical, ReturnDistribution
from trainer.training.data import LabelledRollout, merge_rollouts
from trainer.training.features.extract import ReferenceModel
from trainer.training.features.known import Features, features
from trainer.training.features.store import FeatureStore
from trainer.training.settings import TrainingError


@dataclass(frozen=True, eq=False)
class Labels:
    """The labels of rollouts on M nodes. All arrays are `[L]`.

    Attributes:
        nodes: each label's node, `0 … M − 1`.
        rollout: the index of each label's rollout.
        position: each label's position in the completion.
        rewards: float32.
        weights: each label's weight in the loss, float64.
    """

    nodes: NDArray[np.int64]
    rollout: NDArray[np.int64]
    position: NDArray[np.int64]
    rewards: NDArray[np.float32]
    weights: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Targets:
    """What M nodes are trained towards. All tensors are float32.

    Attributes:
        weights_M: each node's weight in the loss; their mean is 1.
        means_M: the mean reward of each node's rollouts.
        targets_MO: the mean of what a likelihood compares with: `[M, 1]` rewards, or `[M, atoms]` masses.
    """

    weights_M: Tensor
    means_M: Tensor
    targets_MO: Tensor


def read_rollouts(
    reference: ReferenceModel, store: FeatureStore, rollouts: Sequence[LabelledRollout]
) -> tuple[Features, Labels]:
    """The features of all nodes that rollouts label, and the labels.

    Raises:
        TrainingError: a rollout has an empty prompt, so that the reference reads nothing before its first token; or
            the store has no room.
    """
    if alone := next((r for r in rollouts if not len(r.prompt) and r.first_valid == 0), None):
        raise TrainingError(f"rollout {alone.id} has an empty prompt: the reference reads nothing before its token")
    tree, labelled = merge_rollouts(rollouts)
    nodes, judged = np.unique(np.concatenate(labelled), return_inverse=True)
    return features(reference, store, tree, nodes.astype(np.int64)), Labels(
        judged.astype(np.int64),
        np.repeat(np.arange(len(rollouts)), [r.valid for r in rollouts]),
        np.concatenate([np.arange(r.first_valid, len(r.completion)) for r in rollouts]),
        np.repeat(np.array([r.reward for r in rollouts], dtype=np.float32), [r.valid for r in rollouts]),
        np.concatenate([np.full(r.valid, 1 / r.valid) if r.weights is None else r.weights for r in rollouts]),
    )


def targets_of(labels: Labels, nodes: int, returns: ReturnDistribution) -> Targets:
    """The targets of nodes.

    Args:
        labels: each node has at least one.
        nodes: the number of nodes, M.
        returns: the distribution that is predicted.
    """
    weights = np.bincount(labels.nodes, labels.weights, nodes)
    rewards = torch.from_numpy(labels.rewards).double()
    compared = returns.two_hot(rewards) if isinstance(returns, Categorical) else rewards[:, None]

    def mean(values: Tensor) -> Tensor:
        return torch.from_numpy(np.bincount(labels.nodes, labels.weights * values.numpy(), nodes) / weights).float()

    return Targets(
        torch.from_numpy(weights * nodes / weights.sum()).float(),
        mean(rewards),
        torch.stack([mean(column) for column in compared.T], dim=1),
    )
