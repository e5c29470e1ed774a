"""Labels weighed by what guidance asks: how a token compares with those that could stand in its place.

Rollouts of one prompt agree in most of their tokens. Seen as a tree, a node (a token after its prefix) counts once,
however many rollouts label it, and less where it is the only way on.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from trainer.training.data import Rollout

ONLY_WAY = 0.1
"""Weight of a node that has no labelled sibling."""


def weighed(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """The same rollouts, their labels weighed by node; the weights of all sum to the number of rollouts."""
    children: dict[tuple[int, int], int] = {}
    parent_of: list[int] = []
    prompts: dict[bytes, int] = {}
    paths = []
    for r in rollouts:
        prompt = r.prompt.tobytes()
        if prompt not in prompts:
            prompts[prompt] = len(parent_of)
            parent_of.append(-1)
        node, path = prompts[prompt], []
        for token in r.completion.tolist():
            if (node, token) not in children:
                children[node, token] = len(parent_of)
                parent_of.append(node)
            node = children[node, token]
            path.append(node)
        paths.append(path[r.first_valid :])
    labels = Counter(node for path in paths for node in path)
    siblings = Counter(parent_of[node] for node in labels)
    weights = [
        np.array([(1.0 if siblings[parent_of[node]] > 1 else ONLY_WAY) / labels[node] for node in path])
        for path in paths
    ]
    scale = len(rollouts) / sum(float(w.sum()) for w in weights)
    return [replace(r, weights=w * scale) for r, w in zip(rollouts, weights, strict=True)]
