"""A native critic as one trains it oneself: the reference's hidden states of padded rows, kept in memory, then a head.

Shapes: L labels (one for each valid position of each rollout), B rows, S tokens.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.trainer_speed.peers import Batch, Lossy
from benchmarks.trainer_speed.rows import Rows
from qsharp_core.critic.native import NativeHead
from trainer.training.features.extract import ReferenceModel
from trainer.training.rollouts import Rollouts

ROWS = 16
"""Rollouts of a pass."""


@dataclass(frozen=True, eq=False)
class States:
    """What a head reads at each label; has what `native.fit.standardise` asks of features.

    Attributes:
        tokens_M: the label's token, `[L]`.
        log_ref_M: its log-probability, `[L]`.
        states: the hidden state before it, `[L, D]` bfloat16.
        rewards, weights: of each label, `[L]`.
    """

    tokens_M: Tensor
    log_ref_M: Tensor
    states: Tensor
    rewards: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return len(self.tokens_M)

    def hidden(self, index: Tensor) -> Tensor:
        """Hidden states of some labels, `[n, D]`."""
        return self.states[index]


@torch.inference_mode()
def padded_states(reference: ReferenceModel, rollouts: Rollouts) -> States:
    """The states of all rollouts, which are run as rows of similar length, so that there is little padding."""
    rows, model = Rows(rollouts), reference.model
    parts: list[tuple[Tensor, ...]] = []
    for indices in np.array_split(np.argsort(rollouts.lengths, kind="stable"), max(len(rollouts) // ROWS, 1)):
        batch = rows.batch(indices.tolist())
        ids, weights = batch["input_ids"], batch["weights"]
        read = model.base_model(input_ids=ids, attention_mask=batch["attention_mask"], use_cache=False)
        row, place = torch.nonzero(weights, as_tuple=True)
        states, tokens = read.last_hidden_state[row, place - 1], ids[row, place]
        logits = model.get_output_embeddings()(states).float()
        log_ref = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
        parts.append((tokens, log_ref, states.bfloat16(), batch["rewards"][row], weights[row, place]))
    return States(*(torch.cat(column).clone() for column in zip(*parts, strict=True)))


class HeadLoss(Lossy):
    """The weighted mean over labels of the negative log-likelihood; rewards 0 and 1."""

    def __init__(self, head: NativeHead) -> None:
        super().__init__()
        self.head = head

    def forward(
        self, hidden: Tensor, embedding: Tensor, log_ref: Tensor, rewards: Tensor, weights: Tensor
    ) -> dict[str, Tensor]:
        """Arguments as `label_batch` has them."""
        scores = self.head(hidden, embedding, log_ref)[:, 0]
        losses = F.binary_cross_entropy_with_logits(scores, rewards, reduction="none")
        return self.noted((losses * weights).sum() / weights.sum())


def label_batch(states: States, embeddings: Tensor, index: Tensor) -> Batch:
    """What `HeadLoss` reads of some labels."""
    return {
        "hidden": states.hidden(index), "embedding": embeddings[states.tokens_M[index]],
        "log_ref": states.log_ref_M[index], "rewards": states.rewards[index], "weights": states.weights[index],
    }  # fmt: skip
