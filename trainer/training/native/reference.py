"""The reference that a run reads, and the store of its features."""

from pathlib import Path

import torch

from qsharp_core.precision import fast_bfloat16
from trainer.training.features.extract import ReferenceModel
from trainer.training.features.store import FeatureStore
from trainer.training.outputs import Outputs
from trainer.training.prepare import Prepared
from trainer.training.settings import TrainSettings


def reference_of(folder: Path, settings: TrainSettings, prepared: Prepared, device: torch.device) -> ReferenceModel:
    """The reference in a folder, at the temperature of the rollouts, or at 1 if they have several temperatures."""
    temperatures = {policy.temperature or 1.0 for policy in prepared.policies}
    temperature = temperatures.pop() if len(temperatures) == 1 else 1.0
    half = fast_bfloat16() if settings.precision == "auto" else settings.precision == "bf16"
    return ReferenceModel(folder, torch.bfloat16 if half else torch.float32, device, temperature)


def store_of(reference: ReferenceModel, outputs: Outputs) -> FeatureStore:
    """The store of a reference's features."""
    width = reference.identity.hidden_size
    return FeatureStore(outputs.features_folder, reference.digest, width, outputs.features_bytes)
