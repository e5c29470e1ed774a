"""A training run from rollouts to a published version: reads, trains, measures and publishes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from rich.console import Console

from trainer.training.card import card_fields
from trainer.training.heldout import report
from trainer.training.native.critic import NativeTrainable
from trainer.training.outputs import Outputs
from trainer.training.parent_predictions import predict_parent
from trainer.training.parents import comparison
from trainer.training.plots import calibration
from trainer.training.prepare import prepare
from trainer.training.publish import latest, publish
from trainer.training.report import HeldOutLine, MetricsLine, TrainingReport
from trainer.training.run import REPORT, Run
from trainer.training.separate.critic import SeparateTrainable
from trainer.training.settings import Backbone, TrainingError, TrainSettings
from trainer.training.show import print_counts, print_report
from trainer.training.trainable import TrainableCritic, Watch

CRITICS: dict[Backbone, Callable[[TrainSettings, Outputs, Accelerator], TrainableCritic]] = {
    "own": SeparateTrainable,
    "reference": NativeTrainable,
}


def train(paths: list[Path], settings: TrainSettings, outputs: Outputs) -> Path:
    """Trains a critic on the rollouts in Parquet files, and publishes it as the next version of its name.

    Args:
        paths: Parquet files, or folders of them.
        settings: what is learned.
        outputs: where results go.

    Returns:
        The new version's folder; if a finished run is resumed, the folder of the version that it published.

    Raises:
        TrainingError, CriticError
    """
    # Precision is this program's own setting; and a decoder's buffers are constants.
    accelerator = Accelerator(
        mixed_precision="no", kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)]
    )
    with _deterministic(accelerator.device):
        return _train(paths, settings, outputs, accelerator)


def _train(paths: list[Path], settings: TrainSettings, outputs: Outputs, accelerator: Accelerator) -> Path:
    console = Console(quiet=not accelerator.is_main_process)
    critic = CRITICS[settings.backbone](settings, outputs, accelerator)
    requirements = critic.requirements
    returns = requirements.returns
    prepared = prepare(paths, settings, requirements)
    print_counts(console, prepared)
    digest = prepared.everything.digest
    if accelerator.is_main_process:
        before = outputs.parent or settings.continue_from or latest(outputs.out, settings.name)
        Run.prepare(outputs.run, settings, digest, before, outputs.resume)
    accelerator.wait_for_everyone()
    run = Run(outputs.run)
    if run.card.published is not None:
        console.print(f"this run is finished: it published [bold]{run.card.published}[/bold]")
        return _published(outputs, run)

    console.print(critic.begin(prepared))
    # Before the training: a parent that cannot be read should not cost a run.
    parent = None
    if run.card.parent is not None:
        parent = predict_parent(run.card.parent, settings, outputs, prepared, requirements.vocab, accelerator)
    watch, close = _watcher(outputs.tensorboard if accelerator.is_main_process else None)

    def evaluate(step: int, epoch: int) -> float | None:
        if not prepared.held_out:
            return None
        overall = report(critic.predict(prepared.held_out), prepared.held_out, returns).overall
        if accelerator.is_main_process:
            line = HeldOutLine(step=step, epoch=epoch, held_out=overall)
            run.log(line)
            watch(line)
        return overall.log_loss

    progress = critic.fit(prepared, run, evaluate, watch)
    close()

    # What is published is measured: the weights as they are after rounding, computed in float32.
    critic.round_weights()
    predictions = critic.predict(prepared.held_out) if prepared.held_out else None
    held_out = None if predictions is None else report(predictions, prepared.held_out, returns)
    against = None if parent is None else comparison(parent, predictions, returns, prepared)
    if accelerator.is_main_process:
        fields = card_fields(settings, outputs, critic.requirements, prepared, held_out, against) | critic.card()
        folder = publish(outputs.out, fields, critic.save, run.card.id)
        key = f"{folder.parent.name}@{folder.name}"
        training_report = TrainingReport(
            critic=key,
            data=prepared.counts,
            steps=progress.step,
            best_epoch=progress.best_epoch if settings.select == "best" else None,
            held_out=held_out,
            parent=against,
        )
        training_report.write(run.folder / REPORT)
        if predictions is not None and held_out is not None:
            plot = run.folder / "calibration.png"
            calibration(plot, predictions, held_out, f"{key} on held-out prompts", returns.reward_range)
        run.finish(key)
        print_report(console, training_report, folder, run.folder)
    accelerator.wait_for_everyone()
    return _published(outputs, Run(outputs.run))


def _published(outputs: Outputs, run: Run) -> Path:
    assert run.card.published is not None
    return outputs.out / Path(*run.card.published.rsplit("@", 1))


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """On a CPU a resumed run is bit for bit the unbroken one; on GPUs that would cost speed to save roundings."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(before or device.type == "cpu")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _watcher(folder: Path | None) -> tuple[Watch, Callable[[], None]]:
    """What sees every line of metrics, and what closes it: TensorBoard's writer in a folder, or nothing."""
    if folder is None:
        return lambda line: None, lambda: None
    try:
        from torch.utils.tensorboard import SummaryWriter  # optional
    except ImportError as error:
        raise TrainingError("--tensorboard needs the package tensorboard") from error
    writer = SummaryWriter(str(folder))

    def watch(line: MetricsLine) -> None:
        part, figures = ("held_out", line.held_out) if isinstance(line, HeldOutLine) else ("train", line)
        for name, value in figures.model_dump().items():
            if name not in ("step", "n") and value is not None:
                writer.add_scalar(f"{part}/{name}", value, line.step)

    return watch, writer.close
