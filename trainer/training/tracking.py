"""Who sees a run's metrics while it runs: TensorBoard, and the trackers that Accelerate knows (W&B, MLflow, …)."""

from collections.abc import Callable
from functools import partial
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from trainer.training.outputs import Outputs
from trainer.training.publish import next_version
from trainer.training.report import HeldOutLine, MetricsLine
from trainer.training.settings import TrainingError, TrainSettings
from trainer.training.trainable import Watch

PROJECT = "qsharp"
"""Under which trackers file runs."""


def check_trackers(names: tuple[str, ...]) -> None:
    """Returns if all trackers can be used.

    Raises:
        TrainingError: one is unknown to Accelerate, or its package is not installed.
    """
    usable = [str(one) for one in get_available_trackers()]
    for name in names:
        if name not in usable:
            found = ", ".join(usable) or "none"
            raise TrainingError(
                f"--log-with {name}: Accelerate does not find this tracker; here it finds {found}. W&B is the package "
                "wandb, MLflow mlflow"
            )


def watcher(settings: TrainSettings, outputs: Outputs, accelerator: Accelerator) -> tuple[Watch, Callable[[], None]]:
    """What sees every line of metrics, and what closes it. Runs are called by the version that they are to publish.

    Raises:
        TrainingError: TensorBoard is not installed, or a tracker does not start.
    """
    version = f"{settings.name}-{next_version(outputs.out, settings.name)}"
    watches: list[Callable[[dict[str, float], int], None]] = []
    closes: list[Callable[[], None]] = []
    if outputs.log_with:
        named = {"wandb": {"name": version}, "mlflow": {"run_name": version}}
        plain = {k: v for k, v in settings.model_dump(mode="json").items() if isinstance(v, str | int | float | bool)}
        chosen = {k: v for k, v in named.items() if k in outputs.log_with}
        try:
            accelerator.init_trackers(PROJECT, config=plain, init_kwargs=chosen)
        except Exception as error:  # of whichever tracker it is
            raise TrainingError(f"--log-with {' '.join(outputs.log_with)}: it does not start: {error}") from error
        watches.append(lambda figures, step: accelerator.log(figures, step=step))
        closes.append(accelerator.end_training)
    if outputs.tensorboard is not None and accelerator.is_main_process:
        try:
            from torch.utils.tensorboard import SummaryWriter  # optional
        except ImportError as error:
            raise TrainingError("--tensorboard needs the package tensorboard") from error
        writer = SummaryWriter(str(outputs.tensorboard / version))
        watches.append(partial(_scalars, writer))
        closes.append(writer.close)

    def watch(line: MetricsLine) -> None:
        part, figures = ("held_out", line.held_out) if isinstance(line, HeldOutLine) else ("train", line)
        shown = {
            f"{part}/{name}": value
            for name, value in figures.model_dump().items()
            if name not in ("step", "n") and value is not None
        }
        for one in watches:
            one(shown, line.step)

    def close() -> None:
        for one in closes:
            one()

    return watch, close


def _scalars(writer: Any, figures: dict[str, float], step: int) -> None:
    for name, value in figures.items():
        writer.add_scalar(name, value, step)
