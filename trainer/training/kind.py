"""What a run asks of a critic, whatever it is made of: a backbone of its own, or a head on the reference's states.

Called in the order below; `begin` once before what follows it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from qsharp_core.critic.checkpoint import CriticCard
from trainer.training.data import Rollout
from trainer.training.heldout import Predictions
from trainer.training.parents import Parent
from trainer.training.prepare import Learner, Prepared
from trainer.training.run import Progress, Run

Evaluate = Callable[[int, int], float | None]
"""Held-out log-loss after a step of an epoch, None without held-out rollouts."""
Watch = Callable[[dict[str, Any]], None]
"""Sees every line of metrics."""


class Kind(Protocol):
    """A critic that is trained."""

    @property
    def learner(self) -> Learner:
        """What decides which rollouts it can learn from."""

    def begin(self, prepared: Prepared) -> str:
        """Gets ready for these rollouts, and says how they are run."""

    def predict_parent(self, folder: Path, prepared: Prepared) -> Parent:
        """Another critic's predictions on the held-out rollouts."""

    def fit(self, prepared: Prepared, run: Run, evaluate: Evaluate, watch: Watch) -> Progress:
        """Trains to the end; it has the chosen weights then.

        Raises:
            TrainingError: the loss is not finite.
        """

    def round_weights(self) -> None:
        """Rounds the weights to the dtype that is published, to be measured as they are stored."""

    def predict(self, rollouts: Sequence[Rollout]) -> Predictions:
        """Its predictions on held-out rollouts."""

    def card(self) -> dict[str, Any]:
        """What it is made of, for `critic.json`."""

    def save(self, folder: Path, card: CriticCard) -> None:
        """Writes its folder, there whole or not at all."""
