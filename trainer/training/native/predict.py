"""A head's predictions, in the form that all critics' have."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qsharp_core.critic.native import NativeHead
from qsharp_core.returns import ReturnDistribution
from trainer.training.data import LabelledRollout
from trainer.training.features.known import Features
from trainer.training.heldout import Predictions, predictions
from trainer.training.native.nodes import Labels

AT_ONCE = 4096


@torch.inference_mode()
def predict_labels(
    head: NativeHead,
    returns: ReturnDistribution,
    inputs: Features,
    labels: Labels,
    embeddings: Tensor,
    rollouts: Sequence[LabelledRollout],
) -> Predictions:
    """Of every label of rollouts: each node is scored once.

    Args:
        head: in evaluation mode.
        labels: of `rollouts`, on the nodes of `inputs`.
        embeddings: the reference's, `[V, E]`.
    """
    device = head.bias.device
    found = []
    for index in torch.arange(len(inputs)).split(AT_ONCE):
        tokens, log_ref = embeddings[inputs.tokens_M[index]], inputs.log_ref_M[index]
        found.append(head(inputs.hidden(index).to(device), tokens.to(device), log_ref.to(device)).cpu())
    outputs = torch.cat(found)
    of_labels = outputs[torch.from_numpy(labels.nodes)]
    losses = returns.loss(of_labels, torch.from_numpy(labels.rewards))
    return predictions(
        labels.rollout,
        labels.position,
        returns.mean(of_labels).double().numpy(),
        losses.double().numpy(),
        rollouts,
    )
