"""A training run from rollouts to a published version: reads, trains, measures and publishes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from rich.console import Console

from qsharp_core.critic.fetching import local_folder
from qsharp_core.locations import Location
from trainer.training.card import card_fields
from trainer.training.constant import against_constant, learned_nothing
from trainer.training.heldout import report
from trainer.training.learning_plot import learning_curve
from trainer.training.native.critic import NativeTrainable
from trainer.training.outputs import Outputs
from trainer.training.parent_predictions import predict_parent
from trainer.training.parents import comparison
from trainer.training.plots import calibration
from trainer.training.prepare import prepare
from trainer.training.publish import latest, publish
from trainer.training.report import HeldOutLine, TrainingReport
from trainer.training.run import REPORT, Run
from trainer.training.separate.critic import SeparateTrainable
from trainer.training.settings import Backbone, TrainingError, TrainSettings
from trainer.training.show import print_counts, print_held_out, print_report
from trainer.training.threads import NAMED, chosen_threads
from trainer.training.tracking import check_trackers, watcher
from trainer.training.trainable import TrainableCritic

CRITICS: dict[Backbone, Callable[[TrainSettings, Outputs, Accelerator], TrainableCritic]] = {
    "own": SeparateTrainable,
    "reference": NativeTrainable,
}


def train(paths: list[Path], settings: TrainSettings, outputs: Outputs) -> Location:
    """Trains a critic on the rollouts in Parquet files, and publishes it as the next version of its name.

    Args:
        paths: Parquet files, or folders of them.
        settings: what is learned.
        outputs: where results go.

    Returns:
        The new version's folder; if a finished run is resumed, the folder of the version that it published.

    Raises:
        TrainingError: above all, that the critic has learned nothing (unless `outputs.publish_anyway`).
        CriticError
        KeyboardInterrupt: Ctrl-C; with how to go on.
    """
    # Precision is this program's own setting; and a decoder's buffers are constants.
    check_trackers(outputs.log_with)
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else several processes on CPUs would not know of one another
        mixed_precision="no",
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        log_with=list(outputs.log_with) or None,
        project_dir=outputs.run,
    )
    with _deterministic(accelerator.device), _stopped_in_a_line(outputs):
        return _train(paths, settings, outputs, accelerator)


def _train(paths: list[Path], settings: TrainSettings, outputs: Outputs, accelerator: Accelerator) -> Location:
    console = Console(quiet=not accelerator.is_main_process)
    critic = CRITICS[settings.backbone](settings, outputs, accelerator)
    requirements = critic.requirements
    returns = requirements.returns
    scratch = outputs.run.parent
    scratch.mkdir(parents=True, exist_ok=True)
    prepared = prepare(paths, settings, requirements, scratch)
    print_counts(console, prepared)
    digest = prepared.everything.digest
    if accelerator.is_main_process:
        before = outputs.parent or settings.continue_from or _last(outputs, settings)
        alone_on_cpu = accelerator.device.type == "cpu" and accelerator.num_processes == 1
        Run.prepare(outputs.run, settings, digest, before, outputs, chosen_threads if alone_on_cpu else lambda: None)
    accelerator.wait_for_everyone()
    run = Run(outputs.run)
    if run.card.published is not None:
        console.print(f"this run is finished: it published [bold]{run.card.published}[/bold]")
        return _published(outputs, run)

    if run.card.threads is not None:
        torch.set_num_threads(run.card.threads)
        console.print(f"{run.card.threads} threads, by the cores that were free; {NAMED} says another number")
    console.print(critic.begin(prepared))
    # Before the training: a parent that cannot be read should not cost a run.
    parent = None
    if run.card.parent is not None:
        parent = predict_parent(run.card.parent, settings, outputs, prepared, requirements.vocab, accelerator)
    watch, close = watcher(settings, outputs, accelerator)

    def evaluate(step: int, epoch: int) -> float | None:
        if not len(prepared.held_out):
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
    predictions = critic.predict(prepared.held_out) if len(prepared.held_out) else None
    held_out = None if predictions is None else report(predictions, prepared.held_out, returns)
    against = None if parent is None else comparison(parent, predictions, returns, prepared)
    if accelerator.is_main_process and (measurements := run.measurements()):
        learning_curve(run.folder / "learning-curve.png", measurements, f"{settings.name} on held-out prompts")
    if accelerator.is_main_process and predictions is not None and held_out is not None:
        title = f"{settings.name} on held-out prompts"
        calibration(run.folder / "calibration.png", predictions, held_out, title, returns.reward_range)
    if held_out is not None and not outputs.publish_anyway and not against_constant(held_out).better:
        if accelerator.is_main_process:
            print_held_out(console, held_out)
            run.reject()
        raise TrainingError(learned_nothing(held_out, progress.step))
    if accelerator.is_main_process:
        fields = card_fields(settings, outputs, critic.requirements, prepared, held_out, against) | critic.card()
        folder = publish(outputs.out, fields, critic.save, run.card.id, run.folder)
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
        run.finish(key)
        print_report(console, training_report, folder, run.folder)
    accelerator.wait_for_everyone()
    return _published(outputs, Run(outputs.run))


def _last(outputs: Outputs, settings: TrainSettings) -> Path | None:
    """The folder of the name's last version, on this machine's disk."""
    last = latest(outputs.out, settings.name)
    return None if last is None else local_folder(last)


def _published(outputs: Outputs, run: Run) -> Location:
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


@contextmanager
def _stopped_in_a_line(outputs: Outputs) -> Iterator[None]:
    """Has Ctrl-C say how to go on."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        kept = f"stopped; the same command with --resume goes on with what is kept in {outputs.run}"
        raise KeyboardInterrupt(str(stopped) or kept) from None
