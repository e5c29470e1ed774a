"""Where a run's results go."""

from dataclasses import dataclass
from pathlib import Path

import torch

from qsharp_core.locations import Location
from trainer.training.publish import working_folder

FEATURES_BYTES = 20 * 10**9
"""The most that a folder of features holds unless it is set."""


@dataclass(frozen=True)
class Outputs:
    """Where results go, and other settings that do not change what is learned.

    Attributes:
        out: versions are `out/<name>/<version>`; a folder, or a URL of an object store.
        run: the run's folder.
        resume: whether an unfinished run in that folder is continued.
        begin_anew: whether a run of other data in that folder is begun anew, where `resume` would have it refused.
        publish_anyway: whether a version is published that is no better than a constant on held-out rollouts.
        checkpoint_every: steps between two checkpoints.
        tensorboard: folder for TensorBoard, which gets a folder for each version; None is none.
        log_with: trackers of Accelerate's that see the metrics, by name.
        parent: the critic to compare with; None is the one that is continued, else the name's last version.
        recommended_eta: written into the card.
        dtype: of the published weights.
        features: folder of references' features (`backbone: reference`); None is `.features` in the working folder.
        features_bytes: the most that this folder may hold.
    """

    out: Location
    run: Path
    resume: bool = False
    begin_anew: bool = False
    publish_anyway: bool = False
    checkpoint_every: int = 200
    tensorboard: Path | None = None
    log_with: tuple[str, ...] = ()
    parent: Path | None = None
    recommended_eta: float | None = None
    dtype: torch.dtype = torch.float32
    features: Path | None = None
    features_bytes: int = FEATURES_BYTES

    @property
    def features_folder(self) -> Path:
        """Where features are kept."""
        return self.features or working_folder(self.out) / ".features"
