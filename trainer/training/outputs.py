"""Where a run's results go."""

from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Outputs:
    """Where results go, and what does not change them.

    Attributes:
        out: versions are `out/<name>/<version>`.
        run: the run's folder.
        parent: critic to compare with; None for the one that is continued, else the name's last version.
        dtype: of the published weights.
        features: folder of references' features (`backbone: reference`), None for `out/.features`.
        features_bytes: most that it may hold.
    """

    out: Path
    run: Path
    resume: bool = False
    checkpoint_every: int = 200
    tensorboard: Path | None = None
    parent: Path | None = None
    recommended_eta: float | None = None
    dtype: torch.dtype = torch.float32
    features: Path | None = None
    features_bytes: int = 20 * 10**9

    @property
    def features_folder(self) -> Path:
        """Where features are kept."""
        return self.features or self.out / ".features"
