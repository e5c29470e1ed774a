"""Rollouts that share a prompt as one row: the prompt is run once, and its completions are branches after it.

Branches see the prompt and themselves. Shapes: B rows, S tokens of a row (prompt, branches, padding).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

PADDING = -1
PROMPT = 0


@dataclass(frozen=True)
class Rows:
    """What a backbone runs.

    Attributes:
        ids: token ids, `[B, S]`.
        positions: `[B, S]`; a branch's positions go on from the prompt's.
        branch: what each token belongs to, `[B, S]`: PROMPT, a branch's number from 1, or PADDING.
        mask: added to attention scores, `[B, 1, S, S]`.
    """

    ids: Tensor
    positions: Tensor
    branch: Tensor
    mask: Tensor

    def inputs(self) -> dict[str, Tensor]:
        """The inputs of a Hugging Face backbone."""
        return {"input_ids": self.ids, "position_ids": self.positions, "attention_mask": self.mask}


def rows_of(
    prompts: Sequence[Sequence[int]], branches: Sequence[Sequence[Sequence[int]]], device: torch.device
) -> Rows:
    """Rows of which row `b` is `prompts[b]` followed by its branches, each of which goes on from the prompt's end."""
    sizes = [len(prompt) + sum(map(len, tails)) for prompt, tails in zip(prompts, branches, strict=True)]
    shape = (len(prompts), max(sizes))
    ids, positions, branch = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.full(shape, PADDING, np.int64)
    for b, (prompt, completions) in enumerate(zip(prompts, branches, strict=True)):
        end = len(prompt)
        ids[b, :end], positions[b, :end], branch[b, :end] = prompt, np.arange(end), PROMPT
        at = end
        for number, tokens in enumerate(completions, 1):
            where = slice(at, at + len(tokens))
            ids[b, where], branch[b, where] = tokens, number
            positions[b, where] = np.arange(end, end + len(tokens))
            at += len(tokens)
    owner = torch.from_numpy(branch).to(device)
    return Rows(torch.from_numpy(ids).to(device), torch.from_numpy(positions).to(device), owner, _mask(owner))


def _mask(branch: Tensor) -> Tensor:
    size = branch.shape[1]
    order = torch.arange(size, device=branch.device)
    before = order[None, :] <= order[:, None]
    theirs, ours = branch[:, None, :], branch[:, :, None]
    # Padding sees itself: a row of nothing but -inf would be NaN.
    seen = (before & ((theirs == PROMPT) | (theirs == ours))) | torch.eye(size, dtype=torch.bool, device=branch.device)
    return torch.zeros(seen.shape, device=branch.device).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]
