"""The one training loop: what a step of the optimizer does, whatever is trained, and runs of steps in parts.

A step computes a loss and its gradients, clips these, sets the learning rate and updates the parameters. Where the data
comes from differs too much to be the same code: `run_parts` goes through plans that are known beforehand, and
Star-Graph's critic makes a step whenever the server has sent rollouts.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

import torch
from torch import nn
from tqdm import tqdm

from trainer.training.settings import TrainingError
from trainer.training.sharded import whole

BETAS = (0.9, 0.95)

Batch = TypeVar("Batch")
Schedule = Callable[[int, float], float]
"""The learning rate of a step, counted from 1, and of a parameter group's greatest rate."""


@dataclass(frozen=True)
class OptimisationStep:
    """A step that was made.

    Attributes:
        number: from 1.
        loss: the step's loss.
        rate: the learning rate of the first parameter group.
        norm: the gradient's norm before clipping.
        seconds: how long the step took.
    """

    number: int
    loss: float
    rate: float
    norm: float
    seconds: float


class Optimisation:
    """Makes steps, and shows them in a progress bar. To be used as a context manager, which closes the bar.

    Args:
        parameters: what is trained; the gradient's norm is taken over all of it.
        optimizers: their groups' learning rates are the greatest ones.
        schedule: the learning rate of each step.
        clip: the greatest norm of the gradient.
        steps: in all.
        done: steps that were made before, by a run that is resumed.
        description: what the progress bar says.
        quiet: whether there is no bar.

    Attributes:
        done: steps made so far.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        optimizers: Sequence[torch.optim.Optimizer],
        schedule: Schedule,
        *,
        clip: float,
        steps: int,
        done: int = 0,
        description: str = "training",
        quiet: bool = False,
    ) -> None:
        self.done = done
        self._parameters = list(parameters)
        self._groups = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
        self._optimizers = optimizers
        self._schedule = schedule
        self._clip = clip
        self._bar = tqdm(total=steps, initial=done, unit="step", desc=description, smoothing=0.05, disable=quiet)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def step(self, gradients: Callable[[], float]) -> OptimisationStep:
        """Makes a step.

        Args:
            gradients: adds the gradients of the step's loss to the parameters, and returns the loss.

        Raises:
            TrainingError: the loss is not finite.
        """
        began = time.perf_counter()
        loss = gradients()
        if not math.isfinite(loss):
            raise TrainingError(f"the loss became {loss}: lower --lr, or use --precision float32")
        norm = float(whole(nn.utils.clip_grad_norm_(self._parameters, self._clip)))
        self.done += 1
        for group, greatest in self._groups:
            group["lr"] = self._schedule(self.done, greatest)
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self._bar.update()
        return OptimisationStep(self.done, loss, self._groups[0][0]["lr"], norm, time.perf_counter() - began)

    def show(self, **figures: str | int) -> None:
        """Shows figures beside the progress bar."""
        self._bar.set_postfix(figures, refresh=False)

    def say(self, text: str) -> None:
        """Prints a line above the progress bar; nothing where there is no bar."""
        if not self._bar.disable:
            self._bar.write(text)


def run_parts(
    optimisation: Optimisation,
    parts: Iterable[tuple[int, Sequence[Batch]]],
    gradients: Callable[[Batch], float],
    *,
    after_step: Callable[[int, Batch, OptimisationStep], None],
    after_part: Callable[[int, OptimisationStep], None],
    checkpoint: Callable[[OptimisationStep], None] = lambda step: None,
    is_over: Callable[[], bool] = lambda: False,
    enough: Callable[[int], bool] = lambda part: False,
) -> None:
    """Makes the steps of parts: of epochs, for instance.

    Args:
        optimisation: makes the steps.
        parts: numbers of parts, and the batches of the steps that are left to be made in each.
        gradients: adds the gradients of a batch's loss, and returns the loss.
        after_step: told a part's number, a batch and its step.
        after_part: told a part's number and its last step; not called for a part without steps.
        checkpoint: called after each step, and after `after_part` where a part ends with the step.
        is_over: asked after each step whether it was the last one, because the time is over; its part ends with it.
        enough: asked before each part whether the parts so far were enough.

    Raises:
        TrainingError: a loss is not finite.
    """
    for number, batches in parts:
        if enough(number):
            optimisation.say("held-out rollouts gain nothing more: the training ends")
            return
        for place, batch in enumerate(batches, start=1):
            step = optimisation.step(lambda batch=batch: gradients(batch))  # type: ignore[misc]
            after_step(number, batch, step)
            last = is_over()
            if last or place == len(batches):
                after_part(number, step)
            checkpoint(step)
            if last:
                return


def warmup_cosine(step: int, steps: int, greatest: float, warmup: float) -> float:
    """A learning rate that rises linearly over the first `warmup` of the steps, and then falls along a cosine to 0.

    Args:
        step: from 1 to `steps`.
        warmup: a fraction of the steps.
    """
    rising = max(round(warmup * steps), 1)
    if step <= rising:
        return greatest * step / rising
    return greatest * 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising + 1)))


def adamw(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over the parameters that require gradients; biases and vectors, such as those of norms, do not decay."""
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (plain if p.ndim < 2 or name.endswith("bias") else decay).append(p)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS)
