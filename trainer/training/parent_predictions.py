"""The predictions of the version that a new one is compared with, of either kind, on a run's held-out rollouts."""

from pathlib import Path

from accelerate import Accelerator

from qsharp_core.critic.checkpoint import read_card
from trainer.training.base import local_folder
from trainer.training.native.parent import predict_native
from trainer.training.outputs import Outputs
from trainer.training.parents import Parent
from trainer.training.prepare import Prepared
from trainer.training.separate.parent import predict_separate
from trainer.training.settings import TrainSettings


def predict_parent(
    folder: Path, settings: TrainSettings, outputs: Outputs, prepared: Prepared, vocab: int, accelerator: Accelerator
) -> Parent:
    """The predictions of the critic in `folder`.

    Args:
        folder: the parent's.
        settings: of the run.
        outputs: where features of the reference are kept.
        prepared: the run's rollouts.
        vocab: size of the vocabulary that the rollouts' token ids are of.
        accelerator: where passes are run.

    Raises:
        CriticError: the critic cannot be read.
    """
    base = local_folder(settings.base) if settings.base else None
    if read_card(folder).backbone == "reference":
        return predict_native(folder, base, settings, outputs, prepared, accelerator.device)
    return predict_separate(folder, base, settings, vocab, prepared, accelerator)
