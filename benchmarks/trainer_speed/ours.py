"""What `qsharp train` needs around a training: one process, on CPUs, a run's folder, and who watches its steps."""

import shutil
from pathlib import Path

from accelerate import Accelerator

from benchmarks.trainer_speed.turns import Pause
from trainer.training.outputs import Outputs
from trainer.training.report import MetricsLine, StepLine
from trainer.training.run import Run
from trainer.training.settings import TrainSettings
from trainer.training.trainable import Watch


def accelerator() -> Accelerator:
    """One process on CPUs, where all sides are measured."""
    return Accelerator(cpu=True, mixed_precision="no")


def fresh_run(folder: Path, settings: TrainSettings) -> tuple[Run, Outputs]:
    """A new run in a folder, and where its results go; what is there is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    outputs = Outputs(out=folder, run=folder / "run")
    Run.prepare(outputs.run, settings, "", None, outputs)
    return Run(outputs.run), outputs


def pausing(pause: Pause) -> Watch:
    """Has a training pause after each step."""

    def watch(line: MetricsLine) -> None:
        assert isinstance(line, StepLine)
        pause(line.loss)

    return watch
