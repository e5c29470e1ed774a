"""The labels of rollouts on distinct prefixes.

A node is a token after its prefix. A head's outputs at a node are the same for all rollouts through it. A likelihood is
linear in the reward, so a node whose target is the mean of its rollouts has their loss and gradient.

Shapes: M nodes, L labels (one for each valid position of each rollout).
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qsharp_core.returns import Categorical, ReturnDistribution
from trainer.training.data import merge_rollouts
from trainer.training.families import TOGETHER, parts
from trainer.training.features.extract import ReferenceModel
from trainer.training.features.known import Features, features, joined
from trainer.training.features.store import FeatureStore
from trainer.training.rollouts import Rollouts
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


@dataclass(frozen=True, eq=False)
class _Sums:
    """As `Targets`, of some of the nodes; `weights_M` are the sums of their labels' weights, float64."""

    weights_M: NDArray[np.float64]
    means_M: Tensor
    targets_MO: Tensor


def read_targets(
    reference: ReferenceModel,
    store: FeatureStore,
    rollouts: Rollouts,
    returns: ReturnDistribution,
    together: int = TOGETHER,
) -> tuple[Features, Targets]:
    """The features of all nodes that rollouts label, and what these are trained towards.

    Args:
        reference: is run for features that the store lacks.
        store: has the others.
        rollouts: with labels.
        returns: the distribution that is predicted.
        together: tokens of rollouts whose tree and labels are in memory at a time.

    Raises:
        TrainingError: as `read_labels`.
    """
    inputs, sums = [], []
    for found, labels in _read(reference, store, rollouts, together):
        inputs.append(found)
        sums.append(_sums(labels, len(found), returns))
    return joined(inputs), _targets(sums)


def read_labels(
    reference: ReferenceModel, store: FeatureStore, rollouts: Rollouts, together: int = TOGETHER
) -> tuple[Features, Labels]:
    """The features of all nodes that rollouts label, and the labels.

    Args:
        reference, store, rollouts, together: as for `read_targets`.

    Raises:
        TrainingError: a rollout has an empty prompt, so that the reference reads nothing before its first token; or
            the store has no room.
    """
    inputs, parts_of_labels, before = [], [], 0
    for found, labels in _read(reference, store, rollouts, together):
        inputs.append(found)
        parts_of_labels.append(replace(labels, nodes=labels.nodes + before))
        before += len(found)
    columns = (np.concatenate([getattr(labels, one.name) for labels in parts_of_labels]) for one in fields(Labels))
    return joined(inputs), Labels(*columns)


def targets_of(labels: Labels, nodes: int, returns: ReturnDistribution) -> Targets:
    """The targets of nodes.

    Args:
        labels: each node has at least one.
        nodes: the number of nodes, M.
        returns: the distribution that is predicted.
    """
    return _targets([_sums(labels, nodes, returns)])


def _read(
    reference: ReferenceModel, store: FeatureStore, rollouts: Rollouts, together: int
) -> Iterator[tuple[Features, Labels]]:
    """Features and labels of one part of the rollouts after the other; nodes are counted anew in each."""
    if len(alone := np.flatnonzero((rollouts.prompt_lengths == 0) & (rollouts.first_valid == 0))):
        raise TrainingError(
            f"rollout {rollouts.id_of(int(alone[0]))} has an empty prompt: the reference reads nothing before its token"
        )
    for part in parts(rollouts, together):
        some = rollouts.select(part)
        tree, labelled = merge_rollouts(some)
        nodes, judged = np.unique(np.concatenate(labelled), return_inverse=True)
        weights = [np.full(r.valid, 1 / r.valid) if r.weights is None else r.weights for r in some]
        yield (
            features(reference, store, tree, nodes.astype(np.int64)),
            Labels(
                judged.astype(np.int64),
                np.repeat(part, some.valid),
                np.concatenate(
                    [np.arange(first, end) for first, end in zip(some.first_valid, some.completions, strict=True)]
                ),
                np.repeat(some.rewards.astype(np.float32), some.valid),
                np.concatenate(weights),
            ),
        )


def _sums(labels: Labels, nodes: int, returns: ReturnDistribution) -> _Sums:
    weights: NDArray[np.float64] = np.bincount(labels.nodes, labels.weights, nodes).astype(np.float64, copy=False)
    rewards = torch.from_numpy(labels.rewards).double()
    compared = returns.two_hot(rewards) if isinstance(returns, Categorical) else rewards[:, None]

    def mean(values: Tensor) -> Tensor:
        return torch.from_numpy(np.bincount(labels.nodes, labels.weights * values.numpy(), nodes) / weights).float()

    return _Sums(weights, mean(rewards), torch.stack([mean(column) for column in compared.T], dim=1))


def _targets(parts: list[_Sums]) -> Targets:
    weights = np.concatenate([part.weights_M for part in parts])
    return Targets(
        torch.from_numpy(weights * len(weights) / weights.sum()).float(),
        torch.cat([part.means_M for part in parts]),
        torch.cat([part.targets_MO for part in parts]),
    )
