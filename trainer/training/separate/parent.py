"""The predictions of an earlier version that has a backbone of its own, on a run's held-out rollouts."""

from pathlib import Path

from accelerate import Accelerator

from qsharp_core.critic.checkpoint import load
from trainer.training.parents import Parent
from trainer.training.prepare import Prepared
from trainer.training.separate.passes import passes_of
from trainer.training.separate.predict import predict
from trainer.training.separate.scorer import LabelScorer
from trainer.training.settings import TrainSettings


def predict_separate(
    folder: Path, base: Path | None, settings: TrainSettings, vocab: int, prepared: Prepared, accelerator: Accelerator
) -> Parent:
    """The parent's predictions; none if it cannot read these rollouts.

    Args:
        folder: the parent's.
        base: the model whose embeddings the parent borrows, if it does.
        settings: how passes are cut.
        vocab: the number of token ids that the new version knows, and so the rollouts'.
        prepared: the run's rollouts.
        accelerator: devices and processes.
    """
    card, parent = load(folder, device=accelerator.device, reference=base)
    longest = int(prepared.held_out.lengths.max(initial=0))
    able = len(prepared.held_out) and (parent.max_length or longest) >= longest and parent.vocab >= vocab
    if not able:
        return Parent(card.key, parent.distribution, None)
    passes = passes_of(settings, accelerator, parent, prepared.held_out)
    predictions = predict(LabelScorer(parent).eval(), prepared.held_out, passes, accelerator)
    return Parent(card.key, parent.distribution, predictions)
