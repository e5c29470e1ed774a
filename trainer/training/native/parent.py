"""The predictions of an earlier version that is a native critic, on a run's held-out rollouts."""

from pathlib import Path

import torch

from qsharp_core.critic.checkpoint import input_embeddings, read_card
from qsharp_core.critic.native_checkpoint import load_head
from qsharp_core.critic.reference import identify
from trainer.training.native.nodes import read_labels
from trainer.training.native.predict import predict_labels
from trainer.training.native.reference import reference_of, store_of
from trainer.training.outputs import Outputs
from trainer.training.parents import Parent
from trainer.training.prepare import Prepared
from trainer.training.settings import TrainSettings


def predict_native(
    folder: Path, base: Path | None, settings: TrainSettings, outputs: Outputs, prepared: Prepared, device: torch.device
) -> Parent:
    """The parent's predictions; none if `base` is not the reference that the parent was made for.

    Args:
        folder: the parent's.
        base: the reference's folder; None if it is not known.
        settings: of the run.
        outputs: where features are kept.
        prepared: the run's rollouts.
        device: of the passes.

    Raises:
        CriticError: the parent cannot be read.
    """
    card = read_card(folder)
    if base is None or not len(prepared.held_out) or card.made_for != identify(base):
        return Parent(card.key, card.returns(), None)
    _, head = load_head(folder, base)
    reference = reference_of(base, settings, prepared, device)
    features, labels = read_labels(reference, store_of(reference, outputs), prepared.held_out)
    embeddings = input_embeddings(base)
    predictions = predict_labels(head.to(device), card.returns(), features, labels, embeddings, prepared.held_out)
    return Parent(card.key, card.returns(), predictions)
