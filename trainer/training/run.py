"""A run's folder: what makes a killed run go on as if it had not been.

    run.json                what the run is: id, settings, digest of the data; when done, what it published
    checkpoint-00000400/    weights and optimizer state (safetensors), `state.json`; written whole or not at all
    best.safetensors        weights of the best epoch so far
    metrics.jsonl           a line for each step and for each evaluation
    metrics.json            the report: `training.report.TrainingReport`
    calibration.png, learning-curve.png
    3/                      the same of an earlier run, which published version 3

No file of it is ever unpickled. There is no state of random generators: a run draws from its seed, epoch and step.
"""

import json
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

import torch
from pydantic import BaseModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qsharp_core.disk import fsync, whole_file
from trainer.training.outputs import Outputs
from trainer.training.report import HeldOutLine, MetricsLine
from trainer.training.settings import TrainingError, TrainSettings
from trainer.training.sharded import placed, whole

STATE, WEIGHTS = "state.json", "state.safetensors"
METRICS, REPORT = "metrics.jsonl", "metrics.json"


class Progress(BaseModel):
    """How far a run is; `best_loss` is the least held-out log-loss of an epoch, in nats."""

    step: int = 0
    best_loss: float | None = None
    best_epoch: int | None = None


class RunCard(BaseModel):
    """`run.json`.

    Attributes:
        id: of the run.
        settings: what decides what is learned.
        data: digest of the rollouts.
        parent: the critic that the new version will be compared with, fixed when the run starts.
        published: the version that came of it, `name@version`; None as long as there is none.
        rejected: whether it came to its end and published nothing, because it has learned nothing.
        threads: on CPUs, so that a resumed run rounds as an unbroken one does; None leaves them as they are.
    """

    id: str
    settings: TrainSettings
    data: str
    parent: Path | None = None
    published: str | None = None
    rejected: bool = False
    threads: int | None = None


class Run:
    """A run's folder. One process writes; all may read.

    Args:
        folder: as `prepare` left it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.card = RunCard.model_validate_json((folder / "run.json").read_bytes())

    @staticmethod
    def prepare(
        folder: Path,
        settings: TrainSettings,
        data: str,
        parent: Path | None,
        outputs: Outputs,
        threads: Callable[[], int | None] = lambda: None,
    ) -> None:
        """Makes the folder of a new run, or checks that the run in the folder can be continued.

        What a finished run has left there is put aside, into a folder with the number of its version.

        Args:
            folder: of the run.
            settings: what is learned.
            data: digest of the rollouts.
            parent: the critic to compare with.
            outputs: whether a run is continued.
            threads: asked for the number of threads of a new run.

        Raises:
            TrainingError: there is an unfinished run and it is not to be resumed, or the run has other settings.
        """
        path = folder / "run.json"
        if path.is_file():
            card = RunCard.model_validate_json(path.read_bytes())
            if outputs.resume and not (outputs.begin_anew and card.data != data):
                _check_same(folder, card, settings, data)
                return
            if card.published is None and not card.rejected and not outputs.begin_anew:
                raise TrainingError(f"{folder} holds an unfinished run: --resume goes on with it, or delete the folder")
            _put_aside(folder, card.published)
        folder.mkdir(parents=True, exist_ok=True)
        card = RunCard(id=uuid.uuid4().hex, settings=settings, data=data, parent=parent, threads=threads())
        _write(path, card.model_dump_json(indent=2))

    def reject(self) -> None:
        """Notes that the run has come to its end and publishes nothing. What it has made stays, for `--resume`."""
        self.card = self.card.model_copy(update={"rejected": True})
        _write(self.folder / "run.json", self.card.model_dump_json(indent=2))

    def finish(self, published: str) -> None:
        """Notes what the run published; its checkpoints are no longer needed."""
        self.card = self.card.model_copy(update={"published": published, "rejected": False})
        _write(self.folder / "run.json", self.card.model_dump_json(indent=2))
        for path in self._checkpoints():
            shutil.rmtree(path)
        (self.folder / "best.safetensors").unlink(missing_ok=True)

    # --- checkpoints ---

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, *, write: bool) -> None:
        """Writes a checkpoint, and removes older ones once it is there.

        Args:
            model, optimizer: if they are sharded, all processes have to call this together.
            progress: so far.
            write: whether this process writes.
        """
        names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        tensors = {f"model.{name}": p.detach() for p, name in names.items()}
        for p, state in optimizer.state.items():
            tensors |= {f"adam.{kind}.{names[p]}": value for kind, value in state.items()}
        tensors = _gathered(tensors, write)
        if not write:
            return
        target = self.folder / f"checkpoint-{progress.step:08}"
        temporary = self.folder / f".{target.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        save_file(tensors, temporary / WEIGHTS)
        (temporary / STATE).write_text(progress.model_dump_json())
        for path in (temporary / WEIGHTS, temporary / STATE, temporary):
            fsync(path)
        older = self._checkpoints()
        if target in older:
            shutil.rmtree(target)
        temporary.rename(target)
        fsync(self.folder)
        for path in older:
            if path != target:
                shutil.rmtree(path)

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
        """Puts the last checkpoint into model and optimizer; returns its progress, or a fresh one if there is none."""
        checkpoints = self._checkpoints()
        if not checkpoints:
            return Progress()
        tensors = load_file(checkpoints[-1] / WEIGHTS)
        for name, p in model.named_parameters():
            with torch.no_grad():
                p.copy_(placed(tensors[f"model.{name}"], p))
            kinds = ("step", "exp_avg", "exp_avg_sq")
            if f"adam.step.{name}" in tensors:
                state: dict[str, Tensor] = {kind: tensors[f"adam.{kind}.{name}"] for kind in kinds}
                # Adam counts its steps on the CPU, and has its moments beside the weights.
                optimizer.state[p] = {k: v if k == "step" else placed(v, p) for k, v in state.items()}
        return Progress.model_validate_json((checkpoints[-1] / STATE).read_bytes())

    def _checkpoints(self) -> list[Path]:
        return sorted(self.folder.glob("checkpoint-*"))

    def keep_best(
        self, model: nn.Module, progress: Progress, loss: float | None, epoch: int, *, write: bool
    ) -> Progress:
        """Keeps the weights of an epoch if its held-out log-loss is the least so far.

        Args:
            model: has the epoch's weights; if it is sharded, all processes have to call this together.
            progress: so far.
            loss: in nats; None where nothing is held out, then nothing is kept.
            epoch: from 1.
            write: whether this process writes the weights.

        Returns:
            The progress, with the least loss and its epoch.
        """
        if loss is None or (progress.best_loss is not None and loss >= progress.best_loss):
            return progress
        tensors = _gathered({name: p.detach() for name, p in model.named_parameters()}, write)
        if write:
            with whole_file(self.folder / "best.safetensors") as temporary:
                save_file(tensors, temporary)
        return progress.model_copy(update={"best_loss": loss, "best_epoch": epoch})

    def load_best(self, model: nn.Module) -> None:
        """Puts the weights of the best epoch into the model."""
        tensors = load_file(self.folder / "best.safetensors")
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(placed(tensors[name], p))

    # --- metrics ---

    def log(self, line: MetricsLine) -> None:
        """Adds a line to `metrics.jsonl`."""
        with (self.folder / METRICS).open("a") as file:
            file.write(json.dumps(line.model_dump(mode="json")) + "\n")

    def measurements(self) -> list[HeldOutLine]:
        """The measurements on held-out rollouts so far, in order."""
        path = self.folder / METRICS
        lines = path.read_text().splitlines() if path.is_file() else []
        return [HeldOutLine.model_validate_json(line) for line in lines if '"held_out"' in line]

    def forget_after(self, step: int) -> None:
        """Drops the lines of steps that will be made again, and a line that a kill cut short."""
        path = self.folder / METRICS
        if path.is_file():
            whole = path.read_text().split("\n")[:-1]
            _write(path, "".join(f"{line}\n" for line in whole if json.loads(line)["step"] <= step))


def _gathered(tensors: dict[str, Tensor], write: bool) -> dict[str, Tensor]:
    """Whole tensors on the host, for the process that writes; the others take part, and keep nothing."""
    found = {}
    for name, tensor in tensors.items():
        gathered = whole(tensor)
        if write:
            found[name] = gathered.contiguous().cpu()
    return found


def _put_aside(folder: Path, published: str | None) -> None:
    """Moves a finished run's files into a folder of its version's number; removes those of a run without a version."""
    earlier = None if published is None else folder / published.rpartition("@")[2]
    for path in [p for p in folder.iterdir() if not (p.is_dir() and p.name.isdecimal())]:
        if earlier is not None:
            earlier.mkdir(exist_ok=True)
            path.rename(earlier / path.name)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _check_same(folder: Path, card: RunCard, settings: TrainSettings, data: str) -> None:
    ours, theirs = settings.model_dump(mode="json"), card.settings.model_dump(mode="json")
    if differing := [name for name in ours if ours[name] != theirs.get(name)]:
        name = differing[0]
        raise TrainingError(
            f"the run in {folder} has {name} = {theirs.get(name)!r}, not {ours[name]!r}: it cannot go on"
        )
    if card.data != data:
        raise TrainingError(f"the run in {folder} has other data: it cannot go on with these files")


def _write(path: Path, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text)
