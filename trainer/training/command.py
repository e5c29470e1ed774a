"""`qsharp train`: a new version of a critic from rollouts in Parquet files.

    qsharp train --data round-0.parquet --base MODEL --layers 3 --mlp 512 --out critics --name sums
    qsharp train --data round-0.parquet --backbone reference --base REFERENCE --weigh nodes --out critics --name sums
    qsharp train --data round-0.parquet round-1.parquet --continue critics/sums/1 --out critics

With --backbone reference the critic is a head on the hidden states of the reference, which is run once over what is
new in the rollouts; what it said is kept in OUT/.features.

Several devices: `accelerate launch -m trainer.training …` with the same arguments. A killed run goes on with
`--resume` and ends with the weights of an unbroken one. A head alone is trained in a minute or so, and begins again
there; what the reference said so far is kept.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from rich.console import Console

from trainer.training.arguments import critic_name, parser, settings_of
from trainer.training.card import card_fields
from trainer.training.heldout import report
from trainer.training.kind import Kind
from trainer.training.native.kind import Native
from trainer.training.outputs import Outputs
from trainer.training.parents import comparison
from trainer.training.plots import calibration
from trainer.training.prepare import prepare
from trainer.training.publish import latest, publish
from trainer.training.run import Run
from trainer.training.separate import Separate
from trainer.training.settings import TrainingError, TrainSettings
from trainer.training.show import print_counts, print_report


def main(argv: list[str]) -> None:
    """Runs the command.

    Raises:
        TrainingError, CriticError
    """
    args = parser(__doc__).parse_args(argv)
    outputs = Outputs(
        out=args.out,
        run=args.run or args.out / ".runs" / critic_name(args),
        resume=args.resume,
        checkpoint_every=args.checkpoint_every,
        tensorboard=args.tensorboard,
        parent=args.parent,
        recommended_eta=args.recommended_eta,
        dtype=torch.bfloat16 if args.dtype == "bf16" else torch.float32,
        features=args.features,
        features_bytes=int(args.features_gb * 1e9),
    )
    train(args.data, settings_of(args), outputs)


def train(paths: list[Path], settings: TrainSettings, outputs: Outputs) -> Path:
    """Reads, trains, measures and publishes.

    Returns:
        The new version's folder; that of the finished run, if it is resumed.
    """
    # Precision is this program's own setting; and a decoder's buffers are constants.
    accelerator = Accelerator(
        mixed_precision="no", kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)]
    )
    with _deterministic(accelerator.device):
        return _train(paths, settings, outputs, accelerator)


def _train(paths: list[Path], settings: TrainSettings, outputs: Outputs, accelerator: Accelerator) -> Path:
    console = Console(quiet=not accelerator.is_main_process)
    kinds: dict[str, Callable[[TrainSettings, Outputs, Accelerator], Kind]] = {"own": Separate, "reference": Native}
    kind = kinds[settings.backbone](settings, outputs, accelerator)
    returns = kind.learner.returns
    prepared = prepare(paths, settings, kind.learner)
    print_counts(console, prepared)
    digest = prepared.everything.digest
    if accelerator.is_main_process:
        compared = outputs.parent or settings.continue_from or latest(outputs.out, settings.name)
        Run.prepare(outputs.run, settings, digest, compared, outputs.resume)
    accelerator.wait_for_everyone()
    run = Run(outputs.run)
    if run.card.published is not None:
        console.print(f"this run is finished: it published [bold]{run.card.published}[/bold]")
        return _published(outputs, run)

    console.print(kind.begin(prepared))
    # Before the training: a parent that cannot be read should not cost a run.
    parent = kind.predict_parent(run.card.parent, prepared) if run.card.parent else None
    watch, close = _watcher(outputs.tensorboard if accelerator.is_main_process else None)

    def evaluate(step: int, epoch: int) -> float | None:
        if not prepared.held_out:
            return None
        measured = report(kind.predict(prepared.held_out), prepared.held_out, returns)
        line = {"step": step, "epoch": epoch, "held_out": measured["overall"]}
        if accelerator.is_main_process:
            run.log(line)
            watch(line)
        loss: float = measured["overall"]["log_loss"]
        return loss

    progress = kind.fit(prepared, run, evaluate, watch)
    close()

    result: dict[str, Any] = {
        "data": prepared.counts,
        "steps": progress.step,
        "best_epoch": progress.best_epoch if settings.select == "best" else None,
        "held_out": None,
        "parent": None,
    }
    # Of what is published: with its weights as they are after rounding, computed in float32.
    kind.round_weights()
    found = kind.predict(prepared.held_out) if prepared.held_out else None
    if found is not None:
        result["held_out"] = report(found, prepared.held_out, returns)
    if parent is not None:
        result["parent"] = comparison(parent, found, returns, prepared)
    if accelerator.is_main_process:
        fields = card_fields(settings, outputs, kind.learner, prepared, result) | kind.card()
        folder = publish(outputs.out, fields, kind.save, run.card.id)
        key = f"{folder.parent.name}@{folder.name}"
        run.write_report({"critic": key} | result)
        if found is not None:
            plot = run.folder / "calibration.png"
            calibration(plot, found, result["held_out"], f"{key} on held-out prompts", returns.reward_range)
        run.finish(key)
        print_report(console, result, folder, run.folder)
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


def _watcher(folder: Path | None) -> tuple[Callable[[dict[str, Any]], None], Callable[[], None]]:
    """What sees every line of metrics: TensorBoard, or nobody."""
    if folder is None:
        return lambda line: None, lambda: None
    try:
        from torch.utils.tensorboard import SummaryWriter  # optional
    except ImportError as error:
        raise TrainingError("--tensorboard needs the package tensorboard") from error
    writer = SummaryWriter(str(folder))

    def watch(line: dict[str, Any]) -> None:
        part = "held_out" if "held_out" in line else "train"
        for name, value in line.get("held_out", line).items():
            if name not in ("step", "n") and value is not None:
                writer.add_scalar(f"{part}/{name}", value, line["step"])

    return watch, writer.close
