"""Rollouts as tensors for one pass: padded rows, or one tree of the prefixes they share.

Both give the same loss and gradient. In a tree every distinct prefix is a node that is run once and sees its own
ancestors only; the labels of all rollouts through it are read off the same output.

Shapes: B rows of S tokens (a tree: B = 1, S nodes), M judged positions, L labels (one a rollout and valid position).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from trainer.training.data import LabelledRollout
from trainer.training.prefix_tree import merge, sort_key, visible


@dataclass(frozen=True)
class Batch:
    """One pass.

    Attributes:
        input_ids: `[B, S]`.
        attention_mask: `[B, S]`, 1 where there is a token; a tree's is `[1, 1, S, S]`, True where the row sees.
        position_ids: `[B, S]`.
        at: `[M]` judged tokens, as indices into the `B * S` tokens.
        before: `[M]` the token before each.
        judged: `[L]` each label's index into the M.
        rewards: `[L]`.
        weights: `[L]`, each label's in the loss.
        rollout: `[L]` the label's rollout, as a number of the caller's.
        position: `[L]` its position in the completion.
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
        """The same on a device."""
        return Batch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})

    def without_weight(self) -> "Batch":
        """The same, judged by nobody: for a process that has nothing to do in a step, and must take part."""
        return Batch(**{f.name: getattr(self, f.name) for f in fields(self)} | {"weights": self.weights * 0})


def padded(indices: Sequence[int], rollouts: Sequence[LabelledRollout]) -> Batch:
    """A row for each of `rollouts[i]`, padded on the right."""
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


def tree(indices: Sequence[int], rollouts: Sequence[LabelledRollout]) -> Batch:
    """One row that is the prefix tree of all `rollouts[i]`."""
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
    rollouts: Sequence[LabelledRollout],
    input_ids: Tensor,
    attention_mask: Tensor,
    position_ids: Tensor,
    paths: Sequence[np.ndarray],
) -> Batch:
    """Puts each rollout's labels on its path: the index of each of its tokens among the `B * S`."""
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
