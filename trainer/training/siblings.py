"""Weights of labels by what guidance asks the critic: how a token compares with those that could stand in its place.

Rollouts of one prompt agree in most of their tokens. In their prefix tree a node (a token after its prefix) counts
once, however many rollouts label it, and it counts less where no other token after the same prefix has a label.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from trainer.training.data import LabelledRollout, merge_rollouts
from trainer.training.prefix_tree import NO_NODE

ONLY_WAY = 0.1
"""The weight of a node that has no labelled sibling, where others have 1."""


def weighed(rollouts: Sequence[LabelledRollout]) -> list[LabelledRollout]:
    """The same rollouts with weights by node; the weights of all rollouts sum to their number."""
    tree, labelled = merge_rollouts(rollouts)
    labels_N = np.bincount(np.concatenate(labelled), minlength=len(tree))
    families = tree.parents_N - NO_NODE  # nodes with one parent are one family; the first tokens are one, too
    siblings = np.bincount(families[labels_N > 0], minlength=len(tree) + 1)
    weights_N = np.where(siblings[families] > 1, 1.0, ONLY_WAY) / np.maximum(labels_N, 1)
    weights = [weights_N[nodes] for nodes in labelled]
    scale = len(rollouts) / sum(float(w.sum()) for w in weights)
    return [replace(r, weights=w * scale) for r, w in zip(rollouts, weights, strict=True)]
