"""A critic with a backbone of its own: each step has the same rollouts on all sides."""

from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from benchmarks.trainer_speed.ours import accelerator, fresh_run, pausing
from benchmarks.trainer_speed.peers import Rates, Steps, peer
from benchmarks.trainer_speed.rows import RowLoss, Rows
from benchmarks.trainer_speed.turns import Pause, Turn
from qsharp_core.critic.model import Critic
from trainer.training.plan import Plan, plan_of
from trainer.training.rollouts import Rollouts
from trainer.training.separate.batching import plan_epoch, tokens_of
from trainer.training.separate.fit import Fit, fit
from trainer.training.separate.passes import Passes, passes_of
from trainer.training.separate.scorer import LabelScorer
from trainer.training.separate.start import start
from trainer.training.settings import TrainSettings


@dataclass(frozen=True)
class SeparateTraining:
    """One epoch over some rollouts.

    Attributes:
        settings: of the training: float32, one epoch.
        rollouts: what is learned from.
        folder: for what trainings write.
        critic: what all sides start from; None is what the settings say.
    """

    settings: TrainSettings
    rollouts: Rollouts
    folder: Path
    critic: Critic | None = None

    @cached_property
    def passes(self) -> Passes:
        """How `qsharp train` runs these rollouts."""
        return passes_of(self.settings, accelerator(), self._begun(), self.rollouts)

    @cached_property
    def steps(self) -> list[list[int]]:
        """The rollouts of each step."""
        return plan_epoch(self.rollouts, self._plan.batch, self.passes.trees, self.settings.seed, 0)

    def side(self, name: str) -> Turn:
        """The training of a side, with a copy of the critic of its own."""
        if name == "qsharp":
            return Turn(partial(self._fit, self._begun()), deterministic=True)
        steps = Steps(self.steps, Rows(self.rollouts).batch)
        return peer(name, self.folder, RowLoss(self._begun()), steps, Rates.of(self.settings, self._plan))

    @property
    def _plan(self) -> Plan:
        return plan_of(self.settings, tokens_of(self.rollouts))

    def _begun(self) -> Critic:
        return start(self.settings).critic if self.critic is None else deepcopy(self.critic)

    def _fit(self, critic: Critic, pause: Pause) -> None:
        job = Fit(
            scorer=LabelScorer(critic).eval(), sharded=False, returns=critic.distribution, rollouts=self.rollouts,
            settings=self.settings, passes=self.passes, accelerator=accelerator(), autocast=None,
            evaluate=lambda step, epoch: None, watch=pausing(pause), checkpoint_every=2**30,
        )  # fmt: skip
        run, _ = fresh_run(self.folder / "qsharp", self.settings)
        fit(job, run)
