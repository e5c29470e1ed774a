"""Where further rollouts leave those that are there: at tokens that the reference is unsure of.

Guidance asks the critic for all of the reference's top candidates, most of which the reference's own samples hardly
ever take. A branch takes one of them on purpose and lets the reference go on: its reward is a label of every prefix
that contains the token.
"""

import torch
from torch import Tensor

from trainer.default_critic.trees import Tree

CANDIDATES = 8
"""Guidance's own default: how many of the reference's top tokens the critic is asked for."""


def draw_branches(tree: Tree, logits_NV: Tensor, count: int, generator: torch.Generator) -> list[tuple[int, ...]]:
    """Beginnings of completions, each a rollout's own up to some token and then one of the top candidates.

    The rollout is drawn uniformly, the place in it in proportion to the entropy of the reference's next token, and the
    candidate uniformly. `logits_NV` are the reference's after every node, `[nodes, vocab]`.
    """
    entropy_N = torch.distributions.Categorical(logits=logits_NV).entropy()
    beginnings = []
    for _ in range(count):
        path = tree.paths[_index(torch.ones(len(tree.paths)), generator)]
        before = [tree.question - 1, *path[:-1]]  # the node after which each token of the rollout stands
        cut = _index(entropy_N[before], generator)
        candidates = logits_NV[before[cut]].topk(CANDIDATES).indices
        chosen = candidates[_index(torch.ones(CANDIDATES), generator)]
        beginnings.append((*tree.tokens_N[path[:cut]].tolist(), int(chosen)))
    return beginnings


def _index(weights: Tensor, generator: torch.Generator) -> int:
    return int(torch.multinomial(weights, 1, generator=generator))
