"""The critic's outputs at the positions that a pass judges, and their loss."""

import numpy as np
import torch
from torch import Tensor, nn

from qsharp_core.critic.model import Critic
from qsharp_core.returns import ReturnDistribution
from trainer.training.rollouts import Rollouts
from trainer.training.separate.batches import Batch, padded, tree

# Hidden states of a tree and of padded rows differ by rounding only.
TREE_TOLERANCE = 1e-3


class LabelScorer(nn.Module):
    """A critic as it is trained: it computes outputs only where there are labels, in rows as well as in trees."""

    def __init__(self, critic: Critic) -> None:
        super().__init__()
        self.critic = critic

    @property
    def layers(self) -> list[nn.Module]:
        """The backbone's layers, by what its class names as not to be split."""
        names = getattr(self.critic.backbone, "_no_split_modules", None) or ()
        return [module for module in self.critic.backbone.modules() if type(module).__name__ in names]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, at: Tensor, before: Tensor
    ) -> Tensor:
        """The outputs for tokens after their prefixes, `[M, n_out]` float32.

        Args:
            input_ids, attention_mask, position_ids, at, before: see `batches.Batch`.
        """
        hidden = self.hidden(input_ids, attention_mask, position_ids)
        head = self.critic.head
        if head.shape.kind == "V":
            return head.at_tokens(hidden[at]).float()
        return head.of_tokens(hidden[before], input_ids.flatten()[at][:, None])[:, 0].float()

    def hidden(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        """The backbone's last hidden states, `[B * S, D]`."""
        states: Tensor = self.critic.backbone(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        return states.flatten(0, 1)


def outputs_of(scorer: nn.Module, batch: Batch) -> Tensor:
    """The outputs for every label of a batch, `[L, n_out]`."""
    outputs_M: Tensor = scorer(batch.input_ids, batch.attention_mask, batch.position_ids, batch.at, batch.before)
    return outputs_M[batch.judged]


def summed_loss(returns: ReturnDistribution, outputs_L: Tensor, batch: Batch, kind: str = "likelihood") -> Tensor:
    """The sum of all labels' losses, times their weights.

    Args:
        kind: `likelihood` is the negative log-likelihood in nats, `squared` the squared error of the expected reward.
    """
    if kind == "squared":
        losses = (returns.mean(outputs_L) - batch.rewards) ** 2
    else:
        losses = returns.loss(outputs_L, batch.rewards)
    return (losses * batch.weights).sum()


@torch.inference_mode()
def understands_trees(critic: Critic, rollouts: Rollouts, device: torch.device) -> bool:
    """Whether the backbone obeys a tree's mask and positions: a tree is compared with rows, on a few rollouts.

    Not all backbones do: some do not take such a mask, and it does not hold a sliding window shorter than the data.
    """
    longest = int(rollouts.lengths.argmax())
    alike = [i for i in np.flatnonzero(rollouts.groups == rollouts.groups[longest]).tolist() if i != longest][:1]
    chosen = list(dict.fromkeys([longest, *alike, 0]))
    held = rollouts.held(chosen)
    scorer = LabelScorer(critic)
    states = []
    for batch in (padded(chosen, held).to(device), tree(chosen, held).to(device)):
        try:
            hidden = scorer.hidden(batch.input_ids, batch.attention_mask, batch.position_ids)[batch.at][batch.judged]
        except (ValueError, RuntimeError, TypeError):
            return False
        order = sorted(range(len(batch.rollout)), key=lambda k: (batch.rollout[k].item(), batch.position[k].item()))
        states.append(hidden[order])
    rows, nodes = states
    return bool((rows - nodes).abs().max() <= TREE_TOLERANCE * rows.abs().max())
