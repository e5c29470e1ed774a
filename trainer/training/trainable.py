"""What a training run asks of a critic, whether it has a backbone of its own or is a head on the reference's states.

A run calls the methods in the order below, and `begin` once, before any method after it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from qsharp_core.critic.checkpoint import CriticCard
from trainer.training.heldout import Predictions
from trainer.training.prepare import DataRequirements, Prepared
from trainer.training.publish import CardFields
from trainer.training.report import MetricsLine
from trainer.training.rollouts import Rollouts
from trainer.training.run import Progress, Run

Evaluate = Callable[[int, int], float | None]
"""The held-out log-loss after a step of an epoch, in nats; None without held-out rollouts."""
Watch = Callable[[MetricsLine], None]
"""Sees every line of metrics."""


class TrainableCritic(Protocol):
    """A critic that is trained."""

    @property
    def requirements(self) -> DataRequirements:
        """What decides which rollouts the critic can learn from."""

    def begin(self, prepared: Prepared) -> str:
        """Gets ready for these rollouts, and says how they are run."""

    def fit(self, prepared: Prepared, run: Run, evaluate: Evaluate, watch: Watch) -> Progress:
        """Trains to the end; the critic has the chosen weights then.

        Raises:
            TrainingError: the loss is not finite.
        """

    def round_weights(self) -> None:
        """Rounds the weights to the dtype that is published, so that they are measured as they are stored."""

    def predict(self, rollouts: Rollouts) -> Predictions:
        """The critic's predictions on held-out rollouts."""

    def card(self) -> CardFields:
        """The fields of `critic.json` that say what the critic is made of."""

    def save(self, folder: Path, card: CriticCard) -> None:
        """Writes the critic's folder; it is there whole or not at all."""
