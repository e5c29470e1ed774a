"""What `qsharp train` does before it trains: one process, on CPUs, with a run's folder."""

import shutil
from pathlib import Path

from accelerate import Accelerator

from trainer.training.outputs import Outputs
from trainer.training.run import Run
from trainer.training.settings import TrainSettings


def accelerator() -> Accelerator:
    """One process on CPUs, where all sides are measured."""
    return Accelerator(cpu=True, mixed_precision="no")


def fresh_run(folder: Path, settings: TrainSettings) -> tuple[Run, Outputs]:
    """A new run in a folder, and where its results go; what is there is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    outputs = Outputs(out=folder, run=folder / "run")
    Run.prepare(outputs.run, settings, "", None, outputs)
    return Run(outputs.run), outputs
