"""Padded rows of rollouts, and the loss of a separate critic on them: written anew, from the definition alone."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.trainer_speed.peers import Batch, Lossy
from qsharp_core.critic.model import Critic
from trainer.training.rollouts import Rollouts


class Rows:
    """Rollouts in memory, which become batches.

    Shapes: B rollouts of at most S tokens.
    """

    def __init__(self, rollouts: Rollouts) -> None:
        self._ids = [torch.from_numpy(r.token_ids).long() for r in rollouts]
        self._starts = [r.start for r in rollouts]
        self._rewards = torch.from_numpy(rollouts.rewards).float()

    def batch(self, indices: Sequence[int]) -> Batch:
        """`input_ids`, `attention_mask` and `weights`, all `[B, S]`, and `rewards` `[B]`.

        Weights are 0 where there is no label, and sum to 1 in each row.
        """
        width = max(len(self._ids[i]) for i in indices)
        ids = torch.zeros(len(indices), width, dtype=torch.int64)
        mask, weights = torch.zeros_like(ids), torch.zeros(len(indices), width)
        for row, i in enumerate(indices):
            end, start = len(self._ids[i]), self._starts[i]
            ids[row, :end], mask[row, :end], weights[row, start:end] = self._ids[i], 1, 1 / (end - start)
        return {
            "input_ids": ids, "attention_mask": mask, "weights": weights, "rewards": self._rewards[list(indices)],
        }  # fmt: skip


class RowLoss(Lossy):
    """The mean over rollouts of the mean over their labels of the log-loss; for a V head and rewards 0 and 1."""

    def __init__(self, critic: Critic) -> None:
        super().__init__()
        self.critic = critic

    def forward(self, input_ids: Tensor, attention_mask: Tensor, weights: Tensor, rewards: Tensor) -> dict[str, Tensor]:
        """Arguments as `Rows.batch` has them."""
        states = self.critic.backbone(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        judged = weights > 0
        scores = self.critic.head.at_tokens(states[judged])[:, 0]
        earned = rewards[:, None].expand_as(weights)[judged]
        losses = F.binary_cross_entropy_with_logits(scores, earned, reduction="none")
        return self.noted((losses * weights[judged]).sum() / len(rewards))
