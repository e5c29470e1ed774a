"""Predictions of a head on the reference's hidden states, at every valid position of rollouts."""

import torch
from torch import Tensor

from qsharp_core.critic.native import NativeHead
from qsharp_core.returns import ReturnDistribution
from trainer.training.features.known import Features
from trainer.training.heldout import Predictions, predictions
from trainer.training.native.nodes import Labels
from trainer.training.rollouts import Rollouts

AT_ONCE = 4096


@torch.inference_mode()
def predict_labels(
    head: NativeHead,
    returns: ReturnDistribution,
    inputs: Features,
    labels: Labels,
    embeddings: Tensor,
    rollouts: Rollouts,
) -> Predictions:
    """The head's predictions for every label; each node is scored once.

    Args:
        head: in evaluation mode, on its device.
        returns: the distribution that the head predicts.
        inputs: the features of M nodes.
        labels: of `rollouts`, on these nodes.
        embeddings: the reference's, `[V, E]`.
        rollouts: what is predicted.
    """
    of_labels = label_outputs(head, inputs, labels, embeddings)
    losses = returns.loss(of_labels, torch.from_numpy(labels.rewards))
    return predictions(
        labels.rollout,
        labels.position,
        returns.mean(of_labels).double().numpy(),
        losses.double().numpy(),
        rollouts,
    )


@torch.inference_mode()
def label_outputs(head: NativeHead, inputs: Features, labels: Labels, embeddings: Tensor) -> Tensor:
    """The head's outputs for every label, `[L, n_out]`; arguments as for `predict_labels`."""
    device = head.bias.device
    parts = []
    for index in torch.arange(len(inputs)).split(AT_ONCE):
        tokens, log_ref = embeddings[inputs.tokens_M[index]], inputs.log_ref_M[index]
        parts.append(head(inputs.hidden(index).to(device), tokens.to(device), log_ref.to(device)).cpu())
    return torch.cat(parts)[torch.from_numpy(labels.nodes)]
