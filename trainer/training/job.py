"""A training run that is described in a file: what `qsharp loop` starts as a process of its own, or as several.

    python -m trainer.training.job runs/loop/round-1/training.json
    accelerate launch --num_processes 8 -m trainer.training.job runs/loop/round-1/training.json

A process of its own gives all memory back when it ends, on the device that the server needs, too. It ends with the
process that started it, be that the loop or a launcher: two trainings must never write one run's folder.
"""

import sys
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict

from qsharp_core.errors import QSharpError
from qsharp_core.locations import LocationField
from trainer.training.lifeline import end_with
from trainer.training.outputs import FEATURES_BYTES, Outputs
from trainer.training.settings import TrainSettings
from trainer.training.train import train


class Job(BaseModel):
    """The file's content. The run is always resumed: a killed one goes on, and a finished one is left as it is.

    A run whose data have changed since is begun anew. Every version is published, because whoever started the job
    decides whether it is used.

    Attributes:
        data: Parquet files of rollouts.
        settings: what is learned.
        out, run, parent, recommended_eta, dtype, checkpoint_every, features, features_bytes: see `outputs.Outputs`.
        started_by: id of the process that this run must not outlive; None: whichever starts it, as a launcher does.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: list[Path]
    settings: TrainSettings
    out: LocationField
    run: Path
    parent: Path | None = None
    recommended_eta: float | None = None
    dtype: Literal["float32", "bf16"] = "float32"
    checkpoint_every: int = 200
    features: Path | None = None
    features_bytes: int = FEATURES_BYTES
    started_by: int | None = None

    @property
    def outputs(self) -> Outputs:
        """Where results go."""
        return Outputs(
            out=self.out,
            run=self.run,
            resume=True,
            begin_anew=True,
            publish_anyway=True,
            checkpoint_every=self.checkpoint_every,
            parent=self.parent,
            recommended_eta=self.recommended_eta,
            features=self.features,
            features_bytes=self.features_bytes,
            dtype=torch.bfloat16 if self.dtype == "bf16" else torch.float32,
        )


def run(job: Job) -> int:
    """Runs a job; 0 if a version is published, 1 if not."""
    try:
        train(job.data, job.settings, job.outputs)
    except QSharpError as error:
        print(f"training: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # the loop has got it, too, and says how to go on
        return 1
    return 0


if __name__ == "__main__":
    described = Job.model_validate_json(Path(sys.argv[1]).read_bytes())
    end_with(described.started_by)
    sys.exit(run(described))
