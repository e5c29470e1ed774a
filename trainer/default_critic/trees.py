"""A problem's rollouts merged where they agree, and a model run over such trees."""

from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.default_critic.rollouts import Rollout

ANSWER_MARK = 2
"""The question's last tokens, `Answer` and `:`."""


@dataclass(frozen=True)
class Tree:
    """One problem's rollouts, merged where they agree: N nodes, each a token after its ancestors.

    Samples of one problem agree in most of their tokens. A node's score is asked once and judged by all rollouts
    through it, with the same loss and gradient as one row for each rollout.

    Attributes:
        tokens_N: token ids, the question's own first.
        depths_N: how far each is from the end of the shared prefix.
        visible_NN: whether the column's node is the row's ancestor or itself.
        question: how many nodes, the first ones, are the question's.
        labels_N: how many rollouts label a node; 0 in the question.
        rewards_N: mean reward of these.
        decides_N: whether a node is one of several labelled ones after the same token.
        paths: for each rollout, the nodes of its completion.
    """

    tokens_N: Tensor
    depths_N: Tensor
    visible_NN: Tensor
    question: int
    labels_N: Tensor
    rewards_N: Tensor
    decides_N: Tensor
    paths: list[list[int]]


def build_tree(rollouts: list[Rollout], prefix_length: int) -> Tree:
    """Merge rollouts of one problem; `prefix_length` tokens of their prompt are left out."""
    question = rollouts[0].prompt[prefix_length:]
    assert all(r.prompt[prefix_length:] == question for r in rollouts)
    tokens = list(question)
    parents = list(range(-1, len(question) - 1))
    labels, wins = [0] * len(question), [0.0] * len(question)
    children: dict[tuple[int, int], int] = {}
    paths = []
    for rollout in rollouts:
        node, path = len(question) - 1, []
        for position, token in enumerate(rollout.completion):
            if (node, token) not in children:
                children[node, token] = len(tokens)
                tokens.append(token)
                parents.append(node)
                labels.append(0)
                wins.append(0.0)
            node = children[node, token]
            path.append(node)
            if position + 1 >= rollout.given:
                labels[node] += 1
                wins[node] += rollout.reward
        paths.append(path)

    depths: list[int] = []
    visible_NN = torch.eye(len(tokens), dtype=torch.bool)
    for node, parent in enumerate(parents):
        depths.append(0 if parent < 0 else depths[parent] + 1)
        if parent >= 0:
            visible_NN[node] |= visible_NN[parent]
    labels_N = torch.tensor(labels)
    siblings = Counter(parent for parent, count in zip(parents, labels, strict=True) if count)
    return Tree(
        tokens_N=torch.tensor(tokens),
        depths_N=torch.tensor(depths),
        visible_NN=visible_NN,
        question=len(question),
        labels_N=labels_N,
        rewards_N=torch.tensor(wins) / labels_N.clamp(min=1),
        decides_N=torch.tensor([siblings[parent] > 1 for parent in parents]),
        paths=paths,
    )


def pruned(tree: Tree, paths: list[list[int]]) -> Tree:
    """The part of a tree that these of its paths go through, with the labels of all."""
    kept = sorted({*range(tree.question), *(node for path in paths for node in path)})
    index = torch.tensor(kept)
    place = {node: i for i, node in enumerate(kept)}
    return Tree(
        tokens_N=tree.tokens_N[index],
        depths_N=tree.depths_N[index],
        visible_NN=tree.visible_NN[index][:, index],
        question=tree.question,
        labels_N=tree.labels_N[index],
        rewards_N=tree.rewards_N[index],
        decides_N=tree.decides_N[index],
        paths=[[place[node] for node in path] for path in paths],
    )


def thinned(tree: Tree, hide_question: float, hide_token: float) -> Tree:
    """The tree with part of what its nodes see hidden at random, to train on.

    Equations recur between problems. With the question hidden, an equation must be judged by its own digits, which
    holds for held-out problems too; how hard a problem is does not carry over. Draws from torch's generator.
    """
    hidden_N = torch.rand(len(tree.tokens_N)) < hide_token
    if torch.rand(()) < hide_question:
        hidden_N[: tree.question - ANSWER_MARK] = True
        hidden_N[tree.question - ANSWER_MARK : tree.question] = False
    itself_NN = torch.eye(len(tree.tokens_N), dtype=torch.bool)
    return replace(tree, visible_NN=tree.visible_NN & ~hidden_N | itself_NN)


def inputs(trees: list[Tree], prefix_length: int) -> dict[str, Tensor]:
    """A model's arguments for these trees in one batch, padded on the right: each `[trees, nodes]`."""
    widest = max(len(t.tokens_N) for t in trees)
    room = [widest - len(t.tokens_N) for t in trees]
    visible = [F.pad(t.visible_NN, (0, r, 0, r)) for t, r in zip(trees, room, strict=True)]
    return {
        "input_ids": torch.stack([F.pad(t.tokens_N, (0, r)) for t, r in zip(trees, room, strict=True)]),
        "position_ids": torch.stack([F.pad(t.depths_N, (0, r)) for t, r in zip(trees, room, strict=True)])
        + prefix_length,
        "visible": torch.stack(visible)[:, None],
    }
