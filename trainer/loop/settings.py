"""What a loop does, and when it stops."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from qsharp_core.locations import Location
from trainer.evaluation.settings import Setting
from trainer.loop.versions import Version
from trainer.rewards.verifiers import Judge, TaskRef
from trainer.rollouts.parameters import SamplingParameters
from trainer.training.launcher import Launcher
from trainer.training.outputs import FEATURES_BYTES
from trainer.training.settings import TrainSettings
from trainer.trust import EVERYBODY, Trust

# A continued critic has its own.
ARCHITECTURE = {"layers", "head", "atoms", "reward_range", "mlp", "borrow_embeddings", "tokenizer"}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """When a loop stops; None is no limit. A round begins if it fits into the budget, and then runs to its end.

    Attributes:
        rounds: the most rounds in all.
        rollouts: the most rollouts of the reference in all, roll-outs included; roll-ins are not counted.
        seconds: no round begins after so many, counted over all runs of the command.
    """

    rounds: int | None = None
    rollouts: int | None = None
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class CriticRecipe:
    """How versions of a critic are made.

    Attributes:
        settings: of the training of the first version, and of all versions unless they continue.
        out: versions are `out/<name>/<version>`.
        continues: whether later versions go on from the active one, instead of from the base.
        eta: recommended in the cards.
        dtype: of the published weights.
        checkpoint_every: steps between two checkpoints.
        features, features_bytes: where features of the reference are kept, and how much; see `training.outputs`.
        launcher: what starts the processes of a training; none is a single process. The same loop may go on with
            another one.
    """

    settings: TrainSettings
    out: Location
    continues: bool = False
    eta: float | None = None
    dtype: Literal["float32", "bf16"] = "float32"
    checkpoint_every: int = 200
    features: Path | None = None
    features_bytes: int = FEATURES_BYTES
    launcher: Launcher = ()

    def identity(self) -> dict[str, Any]:
        """What tells this recipe from others, as JSON's data for a loop's journal."""
        unset = {name for name in ("owner", "rewards_by") if not getattr(self.settings, name)}  # as older journals
        return {
            "train": self.settings.model_dump(mode="json", exclude=unset),
            "continues": self.continues,
            "out": str(self.out),
        }

    def settings_after(self, active: Version | None) -> TrainSettings:
        """The settings of the next version's training."""
        if active is None or not self.continues:
            return self.settings
        kept = self.settings.model_dump(exclude=ARCHITECTURE)
        return TrainSettings.model_validate(kept | {"continue_from": active.on_disk})


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """What is measured after each round, beside the reference; see `evaluation.settings.Evaluation`."""

    split: str
    samples: int
    settings: tuple[Setting, ...]
    limit: int | None = None


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """What a loop does.

    Attributes:
        task: whose problems are sampled.
        split: of the task.
        model: the name that the server serves the reference under.
        samples: rollouts of each problem, by round; the last number holds for all later rounds, too.
        sampling: how rollouts are sampled.
        eta, guidance: how roll-ins are guided; `guidance` are options of the requests, by name.
        recipe: how versions are made.
        evaluation: what is measured after each round; None is nothing.
        limit: only the first so many problems are sampled; None is all of them.
        seed: another seed makes other rollouts.
        concurrency: requests at once.
        branches: further rollouts of each problem in the first round, which branch off the others.
        trust: whose rollouts and rewards are learned from. Whoever holds the loop's own key must be among them.
    """

    task: TaskRef
    split: str
    model: str
    samples: tuple[int, ...]
    sampling: SamplingParameters
    eta: float
    recipe: CriticRecipe
    guidance: tuple[tuple[str, Any], ...] = ()
    evaluation: EvaluationPlan | None = None
    limit: int | None = None
    seed: int = 0
    concurrency: int = 16
    branches: int = 0
    trust: Trust = EVERYBODY

    def rollouts_of(self, number: int) -> int:
        """The number of the reference's rollouts of each problem in a round, branches included."""
        return self.samples_of(number) + (self.branches if number == 0 else 0)

    def samples_of(self, number: int) -> int:
        """The number of the reference's rollouts of each problem in a round, branches not included."""
        return self.samples[min(number, len(self.samples) - 1)]

    def identity(self, judge: Judge) -> dict[str, Any]:
        """What tells this loop from others, as JSON's data: all that does not merely say how fast it runs."""
        return {
            "format": 1,
            "command": "loop",
            "task": self.task.task.name,
            **{name: getattr(self, name) for name in ("split", "model", "samples", "eta", "limit", "seed")},
            "sampling": asdict(self.sampling),
            "guidance": dict(self.guidance),
            **({"branches": self.branches} if self.branches else {}),
            "verifiers": {verifier.name: verifier.weight for verifier in judge.verifiers},
            "evaluation": asdict(self.evaluation) if self.evaluation else None,
            **self.recipe.identity(),
            **self.trust.identity(),
        }
