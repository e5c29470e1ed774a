"""Which rollouts make a step, and in which passes through the backbone a step is run. Pure functions on indices.

A *step* is a random set of rollouts of about `batch_tokens` tokens. Rollouts are not chosen by their length, because
those of similar length have similar rewards. A step is run in *passes* that waste little: rows of similar length
(`training.rows`), or trees of rollouts that share prefixes (no padding at all).
Neither the cut into passes nor the number of processes changes the step's loss.
"""

import random
from collections.abc import Sequence

from trainer.training.prefix_tree import shared_prefix, sort_key
from trainer.training.rollouts import Indexed, Rollouts

# The attention mask of a tree has the square of its nodes, and so does the work; beyond this, splitting is cheaper.
TREE_NODES = 2048


def plan_epoch(rollouts: Rollouts, batch_tokens: int, together: bool, seed: int, epoch: int) -> list[list[int]]:
    """The steps of an epoch, in which every rollout comes once, in an order that `seed` and `epoch` decide.

    Args:
        batch_tokens: tokens of a step.
        together: whether rollouts of one prompt come in one step as far as they fit, so that shared prefixes run once.
    """
    groups: dict[int, list[int]] = {}
    lengths = rollouts.lengths.tolist()
    for i, prompt in enumerate(rollouts.prompts.tolist()):
        groups.setdefault(prompt if together else i, []).append(i)
    order = list(groups.values())
    dice = random.Random(f"{seed}/{epoch}")
    dice.shuffle(order)
    steps: list[list[int]] = []
    room = 0
    for group in order:
        dice.shuffle(group)
        if sum(lengths[i] for i in group) > room:
            room = 0  # a group that does not fit starts a step, and is split only where it is larger than one
        for i in group:
            if not steps or lengths[i] > room:
                steps.append([])
                room = batch_tokens
            steps[-1].append(i)
            room -= lengths[i]
    return steps


def tokens_of(rollouts: Rollouts) -> int:
    """The number of tokens of some rollouts."""
    return int(rollouts.lengths.sum())


def tree_passes(indices: Sequence[int], rollouts: Indexed, max_nodes: int) -> list[list[int]]:
    """Cuts rollouts into passes whose prefix tree has at most `max_nodes` nodes (or one rollout)."""
    sequences = {i: rollouts[i].token_ids for i in indices}
    passes: list[list[int]] = []
    nodes = 0
    for i in sorted(indices, key=lambda i: (sort_key(sequences[i]), i)):
        if passes:
            # In sorted order no earlier sequence shares more than the one before.
            new = len(sequences[i]) - shared_prefix(sequences[passes[-1][-1]], sequences[i])
            if nodes + new <= max_nodes:
                passes[-1].append(i)
                nodes += new
                continue
        passes.append([i])
        nodes = len(sequences[i])
    return passes


def share(passes: Sequence[list[int]], processes: int) -> list[list[list[int]]]:
    """Deals a step's passes to the processes, the largest first. If there are too few, some processes get none."""
    left = [list(p) for p in passes]
    while len(left) < processes:
        largest = max(left, key=len)
        if len(largest) < 2:
            break
        left.remove(largest)
        left += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
    shares: list[list[list[int]]] = [[] for _ in range(processes)]
    for p in sorted(left, key=len, reverse=True):
        min(shares, key=lambda s: sum(map(len, s))).append(p)
    return shares
