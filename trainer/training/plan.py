"""How long a run trains, in which steps and at which rate, where nobody has said: it follows from the amount of data.

Few rollouts make small steps, so that there are enough of them; many make steps of a size that a machine likes. Unless
epochs or steps are named, these are only the most that a run makes: it ends once `PATIENCE` measurements on held-out
rollouts in a row were no better than the best one before.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from trainer.training.optimisation import warmup_cosine
from trainer.training.settings import TrainSettings

PATIENCE = 3
STEPS_AN_EPOCH = 32
"""As many at least, where the data are enough for steps of the least size."""
LEAST_STEPS = 400
"""As many are planned at least, where that takes no more than `MOST_EPOCHS`."""


@dataclass(frozen=True)
class Scale:
    """The sizes and rates of one kind of critic.

    Attributes:
        least_batch, most_batch: of one step, in tokens, or in distinct prefixes for a head alone.
        least_epochs, most_epochs: that are planned.
        learning_rate: the greatest, at steps of `most_batch`.
    """

    least_batch: int
    most_batch: int
    least_epochs: int
    most_epochs: int
    learning_rate: float


WHOLE_DECODER = Scale(1024, 16384, 3, 20, 1e-4)
FEW_LAYERS = Scale(1024, 16384, 3, 20, 5e-4)
"""Of a decoder's first layers, whose output a fresh head has to learn to read."""
HEAD = Scale(64, 1024, 25, 25, 1e-3)


@dataclass(frozen=True)
class Plan:
    """What a run does.

    Attributes:
        batch: tokens of a step, or distinct prefixes for a head alone.
        epochs: passes over the data.
        steps: of the optimizer, for a head alone.
        learning_rate: the greatest.
        patience: measurements in a row that may be no better than the best one; None: the run goes to its end.
    """

    batch: int
    epochs: int
    steps: int
    learning_rate: float
    patience: int | None

    def is_over(self, measured: int, best: int | None) -> bool:
        """Whether a run ends after so many measurements, of which the `best`-th (from 1) had the least loss."""
        return self.patience is not None and best is not None and measured - best >= self.patience

    def __str__(self) -> str:
        most = "" if self.patience is None else "at most "
        return f"{most}{self.epochs} epochs in steps of {self.batch}, learning rate {self.learning_rate:.1e}"


def scale_of(settings: TrainSettings) -> Scale:
    """The sizes and rates that fit what is trained."""
    if settings.backbone == "reference":
        return HEAD
    return WHOLE_DECODER if settings.layers is None else FEW_LAYERS


def batch_of(settings: TrainSettings, amount: int) -> int:
    """The size of a step.

    Args:
        settings: may name it.
        amount: tokens of the training rollouts, or distinct prefixes for a head alone.
    """
    scale = scale_of(settings)
    return settings.batch_tokens or min(max(amount // STEPS_AN_EPOCH, scale.least_batch), scale.most_batch)


def plan_of(settings: TrainSettings, amount: int) -> Plan:
    """The plan of a run.

    Args:
        settings: what is named there is taken as it is.
        amount: tokens of the training rollouts, or distinct prefixes for a head alone; at least 1.
    """
    scale, batch = scale_of(settings), batch_of(settings, amount)
    an_epoch = amount / batch
    epochs = settings.epochs or min(max(math.ceil(LEAST_STEPS / an_epoch), scale.least_epochs), scale.most_epochs)
    steps = settings.steps or math.ceil(epochs * an_epoch)
    rate = settings.learning_rate or scale.learning_rate
    if settings.backbone == "reference" and settings.learning_rate is None and settings.batch_tokens is None:
        rate *= math.sqrt(batch / scale.most_batch)  # smaller steps are noisier ones
    measured = settings.held_out > 0 and settings.select == "best"
    named = settings.epochs is not None or settings.steps is not None
    return Plan(batch, epochs, steps, rate, PATIENCE if measured and not named else None)


class Clock:
    """The time that a run has, which its learning rate follows, too.

    Args:
        seconds: in all; None is no limit. With a limit the weights depend on how fast the machine was.
    """

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._started = time.monotonic()

    @property
    def share(self) -> float:
        """The share of the time that is over; 0 without a limit."""
        return 0.0 if self._seconds is None else (time.monotonic() - self._started) / self._seconds

    def is_over(self) -> bool:
        """Whether the time is over."""
        return self.share >= 1

    def schedule(self, steps: int, warmup: float) -> Callable[[int, float], float]:
        """A rate that rises and falls over the steps (`optimisation.warmup_cosine`), or faster if time is short."""

        def rate(step: int, greatest: float) -> float:
            at = max(step, min(math.ceil(self.share * steps), steps))
            return warmup_cosine(at, steps, greatest, warmup)

        return rate
