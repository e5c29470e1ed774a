"""Weights of labels by what guidance asks the critic: how a token compares with those that could stand in its place.

Rollouts of one prompt agree in most of their tokens. In their prefix tree a node (a token after its prefix) counts
once, however many rollouts label it, and it counts less where no other token after the same prefix has a label.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.training.data import merge_rollouts
from trainer.training.families import TOGETHER, parts
from trainer.training.prefix_tree import NO_NODE
from trainer.training.rollouts import LabelledRollout, Rollouts
from trainer.training.spill import Spill

ONLY_WAY = 0.1
"""The weight of a node that has no labelled sibling, where others have 1."""


def weighed(rollouts: Rollouts, folder: Path | None = None, together: int = TOGETHER) -> Rollouts:
    """The same rollouts with weights by node; the weights of all rollouts sum to their number.

    Args:
        rollouts: all that are trained on.
        folder: on whose disk the weights are kept.
        together: tokens of rollouts whose tree is in memory at a time.
    """
    weights = Spill(np.float64, folder)
    places, sums = np.empty(len(rollouts), dtype=np.int64), np.empty(len(rollouts))
    for part in parts(rollouts, together):
        for i, of_positions in zip(part, _unscaled(rollouts.select(part)), strict=True):
            places[i], sums[i] = weights.add(of_positions), of_positions.sum()
    return rollouts.weighed(weights, places, len(rollouts) / sum(sums.tolist()))


def _unscaled(rollouts: Iterable[LabelledRollout]) -> list[NDArray[np.float64]]:
    """Weights of each rollout's valid positions, by the tree of these rollouts."""
    tree, labelled = merge_rollouts(rollouts)
    labels_N = np.bincount(np.concatenate(labelled), minlength=len(tree))
    families = tree.parents_N - NO_NODE  # nodes with one parent are one family; the first tokens are one, too
    siblings = np.bincount(families[labels_N > 0], minlength=len(tree) + 1)
    weights_N = np.where(siblings[families] > 1, 1.0, ONLY_WAY) / np.maximum(labels_N, 1)
    return [weights_N[nodes] for nodes in labelled]
