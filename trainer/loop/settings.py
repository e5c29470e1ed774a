"""What a loop does, and when it stops."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.collect import Sampling
from trainer.evaluate import Setting
from trainer.loop.activation import Version
from trainer.rewards.verifiers import Judge, TaskRef
from trainer.training.settings import TrainSettings

# A continued critic's own.
ARCHITECTURE = {"layers", "head", "atoms", "reward_range", "mlp", "borrow_embeddings", "tokenizer"}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """When to stop; None is no limit. A round is begun if it fits, and then runs to its end.

    Attributes:
        rounds: in all.
        rollouts: of the reference, roll-outs included; roll-ins are not counted.
        seconds: no round is begun after so many, counted over all runs of the command.
    """

    rounds: int | None = None
    rollouts: int | None = None
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How versions are made.

    Attributes:
        settings: of the first version, and of all if they start anew.
        continues: later versions go on from the active one, instead of from the base.
        out: versions are `out/<name>/<version>`.
        eta: recommended in the cards.
    """

    settings: TrainSettings
    out: Path
    continues: bool = False
    eta: float | None = None
    dtype: Literal["float32", "bf16"] = "float32"
    checkpoint_every: int = 200

    def identity(self) -> dict[str, Any]:
        """For a loop's journal."""
        return {"train": self.settings.model_dump(mode="json"), "continues": self.continues, "out": str(self.out)}

    def settings_after(self, active: Version | None) -> TrainSettings:
        """Of the next version."""
        if active is None or not self.continues:
            return self.settings
        kept = self.settings.model_dump(exclude=ARCHITECTURE)
        return TrainSettings.model_validate(kept | {"continue_from": active.folder})


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """What is measured after each round, beside the reference."""

    split: str
    samples: int
    settings: tuple[Setting, ...]
    limit: int | None = None


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """What a loop does.

    Attributes:
        samples: rollouts of each problem, by round; the last number is that of all later rounds.
        branches: further ones of each problem in the first round, which leave these.
        eta, guidance: of the roll-ins; `guidance` are other fields of the requests.
        evaluation: None is no evaluation.
    """

    task: TaskRef
    split: str
    model: str
    samples: tuple[int, ...]
    sampling: Sampling
    eta: float
    recipe: Recipe
    guidance: tuple[tuple[str, Any], ...] = ()
    evaluation: EvaluationPlan | None = None
    limit: int | None = None
    seed: int = 0
    concurrency: int = 16
    branches: int = 0

    def rollouts_of(self, number: int) -> int:
        """Rollouts of the reference of each problem in a round."""
        return self.samples_of(number) + (self.branches if number == 0 else 0)

    def samples_of(self, number: int) -> int:
        """Whole ones, or roll-outs, of each problem in a round."""
        return self.samples[min(number, len(self.samples) - 1)]

    def identity(self, judge: Judge) -> dict[str, Any]:
        """What makes it this loop: all but what only says how fast."""
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
        }
