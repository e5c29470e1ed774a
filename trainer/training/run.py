"""A run's folder: what makes a killed run go on as if it had not been.

    run.json                what the run is: id, settings, digest of the data; when done, what it published
    checkpoint-00000400/    weights and optimizer state (safetensors), `state.json`; written whole or not at all
    best.safetensors        weights of the best epoch so far
    metrics.jsonl           a line for each step and for each evaluation
    metrics.json            the report: counts, held-out metrics, comparison with the parent
    calibration.png

No file of it is ever unpickled. There is no state of random generators: a run draws from its seed, epoch and step.
"""

import json
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qsharp_core.disk import fsync
from trainer.training.settings import TrainingError, TrainSettings

STATE, WEIGHTS = "state.json", "state.safetensors"


class Progress(BaseModel):
    """Where a run is; `best_loss` is the least held-out log-loss of an epoch, in nats."""

    step: int = 0
    best_loss: float | None = None
    best_epoch: int | None = None


class RunCard(BaseModel):
    """`run.json`; `parent` is what the new version will be compared with, fixed when the run starts."""

    id: str
    settings: TrainSettings
    data: str
    parent: Path | None = None
    published: str | None = None


class Run:
    """A run's folder. One process writes; all may read.

    Args:
        folder: as `prepare` left it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.card = RunCard.model_validate_json((folder / "run.json").read_bytes())

    @staticmethod
    def prepare(folder: Path, settings: TrainSettings, data: str, parent: Path | None, resume: bool) -> None:
        """Makes the folder of a new run, or checks that the one there can be gone on with.

        Raises:
            TrainingError: there is an unfinished run and `resume` was not asked for, or it is of other settings.
        """
        path = folder / "run.json"
        if path.is_file():
            found = RunCard.model_validate_json(path.read_bytes())
            if resume:
                _check_same(folder, found, settings, data)
                return
            if found.published is None:
                raise TrainingError(f"{folder} holds an unfinished run: --resume goes on with it, or delete the folder")
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        card = RunCard(id=uuid.uuid4().hex, settings=settings, data=data, parent=parent)
        _write(path, card.model_dump_json(indent=2))

    def finish(self, published: str) -> None:
        """Notes what the run published; its checkpoints are no longer needed."""
        self.card = self.card.model_copy(update={"published": published})
        _write(self.folder / "run.json", self.card.model_dump_json(indent=2))
        for path in self._checkpoints():
            shutil.rmtree(path)
        (self.folder / "best.safetensors").unlink(missing_ok=True)

    # --- checkpoints ---

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """A checkpoint; older ones go once it is there."""
        names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        tensors = {f"model.{name}": p.detach() for p, name in names.items()}
        for p, state in optimizer.state.items():
            tensors |= {f"adam.{kind}.{names[p]}": value for kind, value in state.items()}
        target = self.folder / f"checkpoint-{progress.step:08}"
        temporary = self.folder / f".{target.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, temporary / WEIGHTS)
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
        """Puts the last checkpoint into model and optimizer; a fresh `Progress` where there is none."""
        checkpoints = self._checkpoints()
        if not checkpoints:
            return Progress()
        tensors = load_file(checkpoints[-1] / WEIGHTS)
        for name, p in model.named_parameters():
            with torch.no_grad():
                p.copy_(tensors[f"model.{name}"])
            kinds = ("step", "exp_avg", "exp_avg_sq")
            if f"adam.step.{name}" in tensors:
                state: dict[str, Tensor] = {kind: tensors[f"adam.{kind}.{name}"] for kind in kinds}
                # Adam counts its steps on the CPU, and has its moments beside the weights.
                optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in state.items()}
        return Progress.model_validate_json((checkpoints[-1] / STATE).read_bytes())

    def _checkpoints(self) -> list[Path]:
        return sorted(self.folder.glob("checkpoint-*"))

    def save_best(self, model: nn.Module) -> None:
        """The weights of the best epoch so far."""
        temporary = self.folder / ".best.tmp"
        save_file({k: v.detach().contiguous().cpu() for k, v in model.named_parameters()}, temporary)
        fsync(temporary)
        temporary.rename(self.folder / "best.safetensors")

    def load_best(self, model: nn.Module) -> None:
        """Puts them into the model."""
        tensors = load_file(self.folder / "best.safetensors")
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(tensors[name])

    # --- metrics ---

    def log(self, line: dict[str, Any]) -> None:
        """Adds a line to `metrics.jsonl`."""
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def forget_after(self, step: int) -> None:
        """Drops the lines of steps that will be run again, and one that a kill cut short."""
        path = self.folder / "metrics.jsonl"
        if path.is_file():
            whole = path.read_text().split("\n")[:-1]
            _write(path, "".join(f"{line}\n" for line in whole if json.loads(line)["step"] <= step))

    def write_report(self, report: dict[str, Any]) -> None:
        """`metrics.json`."""
        _write(self.folder / "metrics.json", json.dumps(report, indent=2) + "\n")


def _check_same(folder: Path, found: RunCard, settings: TrainSettings, data: str) -> None:
    ours, theirs = settings.model_dump(mode="json"), found.settings.model_dump(mode="json")
    if differing := [name for name in ours if ours[name] != theirs.get(name)]:
        name = differing[0]
        raise TrainingError(
            f"the run in {folder} has {name} = {theirs.get(name)!r}, not {ours[name]!r}: it cannot go on"
        )
    if found.data != data:
        raise TrainingError(f"the run in {folder} has other data: it cannot go on with these files")


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    fsync(temporary)
    temporary.rename(path)
    fsync(path.parent)
