"""The two that `qsharp train` is compared with: Hugging Face's `Trainer`, and the loop that one writes oneself.

Both train a module that returns its loss, on batches that are made when their step comes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks.trainer_speed.turns import Pause, Turn
from trainer.training.optimisation import adamw, warmup_cosine
from trainer.training.plan import Plan
from trainer.training.settings import TrainSettings

Batch = dict[str, Tensor]
"""Arguments of a module, by name."""


class Lossy(nn.Module):
    """A module whose `forward` returns `{"loss": …}`, and that knows its last loss."""

    last: Tensor

    def noted(self, loss: Tensor) -> dict[str, Tensor]:
        """What `forward` returns."""
        self.last = loss.detach()
        return {"loss": loss}


class Steps(Dataset[Batch]):
    """The batch of each step.

    Args:
        indices: of the examples of each step.
        batch: makes a batch of examples.
    """

    def __init__(self, indices: Sequence[Any], batch: Callable[[Any], Batch]) -> None:
        self._indices, self._batch = indices, batch

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, step: int) -> Batch:
        return self._batch(self._indices[step])


@dataclass(frozen=True)
class Rates:
    """How weights are changed: by AdamW, as `qsharp train` does it."""

    learning_rate: float
    warmup: float
    weight_decay: float
    clip: float

    @classmethod
    def of(cls, settings: TrainSettings, plan: Plan) -> "Rates":
        """Those of a run."""
        return cls(plan.learning_rate, settings.warmup, settings.weight_decay, settings.clip)

    def optimizer(self, model: nn.Module, steps: int) -> tuple[torch.optim.AdamW, LambdaLR]:
        """The optimiser, and what sets its learning rate."""
        made = adamw(model, self.learning_rate, self.weight_decay)
        return made, LambdaLR(made, lambda done: warmup_cosine(done + 1, steps, 1.0, self.warmup))


def peer(side: str, folder: Path, model: Lossy, steps: Steps, rates: Rates) -> Turn:
    """The training of a side that is not `qsharp train`; what it writes goes below the folder."""
    train = plain if side == "plain" else partial(hugging_face, folder=folder / side)
    return Turn(partial(train, model, steps, rates))


def plain(model: Lossy, steps: Steps, rates: Rates, pause: Pause) -> None:
    """The loop that one writes oneself."""
    optimizer, schedule = rates.optimizer(model, len(steps))
    model.train()
    for batch in DataLoader(steps, batch_size=None):
        model(**batch)["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), rates.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        pause(float(model.last))


def hugging_face(model: Lossy, steps: Steps, rates: Rates, pause: Pause, folder: Path) -> None:
    """`transformers.Trainer`, which neither logs nor saves anything."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=len(steps),
        max_grad_norm=rates.clip,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    _Trainer(
        model=model,
        args=arguments,
        train_dataset=steps,
        optimizers=rates.optimizer(model, len(steps)),
        callbacks=[_Pausing(model, pause)],
    ).train()


class _Trainer(Trainer):
    """Takes batches as they are: `Trainer` alone has none of other sizes."""

    def get_train_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(self.train_dataset, batch_size=None)


class _Pausing(TrainerCallback):
    def __init__(self, model: Lossy, pause: Pause) -> None:
        self._model, self._pause = model, pause

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._pause(float(self._model.last))
