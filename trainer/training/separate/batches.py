"""Rollouts as tensors for one pass: padded rows, or one tree of the prefixes they share.

Both give the same loss and gradient. In a tree every distinct prefix is a node, which is run once and sees its own
ancestors only. The labels of all rollouts through a node are read off the same output.

Shapes: B rows of S tokens (a tree: B = 1, S nodes), M judged positions, L labels (one for each valid position of each
rollout).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from trainer.training.prefix_tree import merge, sort_key, visible
from trainer.training.rollouts import Indexed


@dataclass(frozen=True)
class Batch:
    """The tensors of one pass.

    Attributes:
        input_ids: `[B, S]`.
        attention_mask: `[B, S]`, 1 where there is a token; for a tree `[1, 1, S, S]`, True where a node sees another.
        position_ids: `[B, S]`.
        at: the judged tokens, as indices into the `B * S` tokens, `[M]`.
        before: the token before each of them, as such an index, `[M]`.
        judged: the index of each label's token among the M, `[L]`.
        rewards: of each label, `[L]`.
        weights: of each label in the loss, `[L]`.
        rollout: the index of each label's rollout, `[L]`.
        position: of each label in the completion, `[L]`.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    at: Tensor
    before: Tensor
    judged: Tensor
    rewards: Tensor
    weights: Tensor
    rollout: Tensor
    position: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device."""
        return Batch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})

    def without_weight(self) -> "Batch":
        """The batch with weights of 0, for a process that has nothing to do in a step and must take part in it."""
        return Batch(**{f.name: getattr(self, f.name) for f in fields(self)} | {"weights": self.weights * 0})


def padded(indices: Sequence[int], rollouts: Indexed) -> Batch:
    """A batch with a row for each of `rollouts[i]`, padded on the right."""
    width = max(rollouts[i].length for i in indices)
    ids = np.zeros((len(indices), width), dtype=np.int64)
    mask = np.zeros((len(indices), width), dtype=np.int64)
    paths = []
    for row, i in enumerate(indices):
        tokens = rollouts[i].token_ids
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
        paths.append(row * width + np.arange(len(tokens)))
    positions = torch.arange(width).expand(len(indices), width)
    return _labelled(indices, rollouts, torch.from_numpy(ids), torch.from_numpy(mask), positions, paths)


def tree(indices: Sequence[int], rollouts: Indexed) -> Batch:
    """A batch of one row, which is the prefix tree of all `rollouts[i]`."""
    order = sorted(indices, key=lambda i: (sort_key(rollouts[i].token_ids), i))
    merged = merge([rollouts[i].token_ids for i in order])
    seen = visible(merged, np.arange(len(merged)))
    return _labelled(
        order,
        rollouts,
        torch.from_numpy(merged.tokens_N.astype(np.int64))[None],
        torch.from_numpy(seen)[None, None],
        torch.from_numpy(merged.depths_N.astype(np.int64))[None],
        [path.astype(np.int64) for path in merged.paths],
    )


def _labelled(
    indices: Sequence[int],
    rollouts: Indexed,
    input_ids: Tensor,
    attention_mask: Tensor,
    position_ids: Tensor,
    paths: Sequence[np.ndarray],
) -> Batch:
    """Puts each rollout's labels on its path, which has the index of each of its tokens among the `B * S` tokens."""
    at, before, rewards, weights, rollout, position = [], [], [], [], [], []
    for i, path in zip(indices, paths, strict=True):
        r = rollouts[i]
        at.append(path[r.start :])
        # An empty prompt's first token has none before it; `data` lets it be judged only where it is the only one.
        before.append(path[np.maximum(np.arange(r.start, len(path)) - 1, 0)])
        rewards.append(np.full(r.valid, r.reward))
        weights.append(np.full(r.valid, 1 / r.valid) if r.weights is None else r.weights)
        rollout.append(np.full(r.valid, i))
        position.append(np.arange(r.first_valid, len(r.completion)))
    nodes, where, judged = np.unique(np.concatenate(at), return_index=True, return_inverse=True)
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        at=torch.from_numpy(nodes),
        before=torch.from_numpy(np.concatenate(before)[where]),
        judged=torch.from_numpy(judged),
        rewards=torch.from_numpy(np.concatenate(rewards)).float(),
        weights=torch.from_numpy(np.concatenate(weights)).float(),
        rollout=torch.from_numpy(np.concatenate(rollout)),
        position=torch.from_numpy(np.concatenate(position)),
    )
