"""A critic's outputs at every labelled position of rollouts, of either kind of critic.

Shapes: L labels.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from qsharp_core.critic.checkpoint import input_embeddings, load, read_card
from qsharp_core.critic.native_checkpoint import load_head
from qsharp_core.precision import fast_bfloat16
from qsharp_core.returns import ReturnDistribution
from trainer.training.features.extract import ReferenceModel
from trainer.training.features.store import FeatureStore
from trainer.training.heldout import Predictions, predictions
from trainer.training.native.nodes import read_labels
from trainer.training.native.predict import label_outputs
from trainer.training.outputs import FEATURES_BYTES
from trainer.training.rollouts import Rollouts
from trainer.training.separate.batching import plan_epoch
from trainer.training.separate.passes import passes_of
from trainer.training.separate.scorer import LabelScorer, outputs_of
from trainer.training.settings import TrainSettings

TOKENS = 65536
"""Of rollouts that are run together."""


@dataclass(frozen=True, eq=False)
class LabelOutputs:
    """Outputs of a critic.

    Attributes:
        returns: what they mean.
        rollouts: of the labels.
        rollout: the index of each label's rollout, `[L]`.
        position: of each label in the completion, `[L]`.
        outputs: `[L, n_out]` float32.
    """

    returns: ReturnDistribution
    rollouts: Rollouts
    rollout: NDArray[np.int64]
    position: NDArray[np.int64]
    outputs: Tensor

    @property
    def rewards(self) -> Tensor:
        """Of each label, `[L]`."""
        return torch.from_numpy(self.rollouts.rewards[self.rollout]).float()

    @property
    def weights(self) -> Tensor:
        """Of each label; those of a rollout sum to 1. `[L]` float64."""
        return torch.from_numpy(1 / self.rollouts.valid[self.rollout])

    def losses(self, temperature: Tensor | float = 1.0) -> Tensor:
        """Each label's log-loss `[L]` in nats, if the outputs are divided by a temperature."""
        return self.returns.loss(self.outputs.double() / temperature, self.rewards)

    def predictions(self, temperature: Tensor | float = 1.0) -> Predictions:
        """As a training measures them.

        Args:
            temperature: what outputs are divided by: a number, or one for each label, `[L, 1]`.
        """
        means = self.returns.mean(self.outputs.double() / temperature).numpy()
        return predictions(self.rollout, self.position, means, self.losses(temperature).numpy(), self.rollouts)


def outputs(critic: Path, base: Path, rollouts: Rollouts, features: Path) -> LabelOutputs:
    """The outputs of the critic in a folder.

    Args:
        critic: its folder.
        base: the reference's.
        rollouts: what it reads.
        features: where the reference's states are kept, for a native critic.

    Raises:
        CriticError: the critic cannot be read, or was made for another reference.
        TrainingError: the features do not fit on the disk.
    """
    if read_card(critic).backbone == "reference":
        return _native(critic, base, rollouts, features)
    return _separate(critic, base, rollouts)


def _native(critic: Path, base: Path, rollouts: Rollouts, features: Path) -> LabelOutputs:
    card, head = load_head(critic, base)
    temperatures = {policy.temperature or 1.0 for policy in rollouts.policies}
    dtype = torch.bfloat16 if fast_bfloat16() else torch.float32
    temperature = temperatures.pop() if len(temperatures) == 1 else 1.0
    reference = ReferenceModel(base, dtype, torch.device("cpu"), temperature)
    store = FeatureStore(features, reference.digest, reference.identity.hidden_size, FEATURES_BYTES)
    inputs, labels = read_labels(reference, store, rollouts)
    found = label_outputs(head, inputs, labels, input_embeddings(base))
    return LabelOutputs(card.returns(), rollouts, labels.rollout, labels.position, found)


@torch.inference_mode()
def _separate(critic: Path, base: Path, rollouts: Rollouts) -> LabelOutputs:
    _, model = load(critic, reference=base)
    scorer = LabelScorer(model).eval()
    passes = passes_of(TrainSettings(base=str(base)), Accelerator(cpu=True), model, rollouts)
    parts: list[tuple[Tensor, ...]] = []
    for chunk in plan_epoch(rollouts, TOKENS, passes.trees, seed=0, epoch=0):
        for batch in passes.batches(chunk, rollouts):
            parts.append((batch.rollout, batch.position, outputs_of(scorer, batch)))
    rollout, position, found = (torch.cat(column) for column in zip(*parts, strict=True))
    return LabelOutputs(model.distribution, rollouts, rollout.numpy(), position.numpy(), found)
