"""Tables of a recipe that kinds share, and what they become."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt

from qsharp_core.wire.guidance import METHODS, MethodName, TailName
from trainer.collect import Sampling
from trainer.evaluate import REFERENCE, Evaluation, Setting
from trainer.loop.settings import LoopSettings
from trainer.loop.settings import Recipe as Versions
from trainer.rewards.verifiers import Judge, TaskRef, Weighted
from trainer.tasks.base import Task
from trainer.training.settings import TrainSettings

SERVED = "served"
"""As `critic.base`: the model that is served."""
ROWS = (REFERENCE, *METHODS)


class Fields(BaseModel):
    """Of a recipe, or a table in it."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SamplingFields(Fields):
    """The reference policy; what is None is the task's."""

    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    max_tokens: PositiveInt | None = None

    def of(self, task: Task) -> Sampling:
        """For a task's problems."""
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_tokens=self.max_tokens or task.sampling.max_tokens,
            stop=task.sampling.stop,
        )


class GuidanceFields(Fields):
    """The request's `guidance`; what is None is the server's default."""

    candidates: PositiveInt | None = None
    min_prob: float | None = Field(default=None, ge=0, le=1)
    tail: TailName | None = None

    def options(self) -> tuple[tuple[str, Any], ...]:
        """Those that are given."""
        return tuple(self.model_dump(exclude_none=True).items())


class ServerFields(Fields):
    """The server: one of the recipe's own, or one that runs.

    Attributes:
        url, admin_key: of one that runs, with a rollout store, and sees the recipe's folder at the same path.
        flags: of `qsharp serve`, where it is the recipe's own.
        concurrency: requests at once.
        patience: seconds to wait until the server answers.
    """

    url: str | None = None
    admin_key: str | None = None
    flags: tuple[str, ...] = ()
    concurrency: PositiveInt = 32
    patience: PositiveFloat = 1800.0


class EvaluationFields(Fields):
    """What is measured, beside the reference: every method at every eta.

    Attributes:
        samples: of each problem under each setting.
        limit: only the first so many problems.
        scored: whether the critic scores each completion, for best-of-k and weighted majorities.
    """

    split: str = "held_out"
    samples: PositiveInt = 4
    limit: PositiveInt | None = None
    etas: tuple[PositiveFloat, ...] = (0.1,)
    methods: tuple[MethodName, ...] = METHODS
    scored: bool = True

    def of(self, recipe: "Sampled", model: str, critic: str, task: Task) -> Evaluation:
        """For a critic's exact version."""
        return Evaluation(
            split=self.split,
            model=model,
            samples=self.samples,
            sampling=recipe.sampling.of(task),
            settings=tuple(Setting(method, eta) for method in self.methods for eta in self.etas),
            critic=critic,
            guidance=recipe.guidance.options(),
            scored=self.scored,
            limit=self.limit,
            seed=recipe.seed,
        )


class Published(Fields):
    """Somebody else's numbers, to stand beside one's own.

    Attributes:
        source: where they are from.
        eta: of what is guided.
        results: by what they are of; `reference`, `cd` and `qsharp` are rows of the table.
    """

    class Figure(Fields):
        """Accuracy in percent, KL in nats."""

        accuracy: float
        kl: float | None = None

    source: str
    eta: PositiveFloat = 0.1
    results: dict[str, Figure]

    def rows(self) -> dict[tuple[str, float | None], tuple[str, str]]:
        """For the table: accuracy and KL, by method and eta."""
        return {
            (name, None if name == REFERENCE else self.eta): (
                f"{one.accuracy:g} %",
                "–" if one.kl is None else f"{one.kl:g}",
            )
            for name, one in self.results.items()
            if name in ROWS
        }

    def others(self) -> str:
        """What no row of the table is about, and the source; for people."""
        found = [
            f"{name.replace('_', ' ')} {one.accuracy:g} %" for name, one in self.results.items() if name not in ROWS
        ]
        return ", ".join([*found, self.source])


class RolloutFields(Fields):
    """What is learned from.

    Attributes:
        samples: rollouts of each problem, by round; as many numbers as rounds.
        branches: further ones of each problem in the first round, which leave these where the reference is unsure.
        eta: of the guided part of later rounds' rollouts.
        limit: only the first so many problems.
        continues: later versions go on from the one before, instead of from `critic.base`.
    """

    split: str = "train"
    samples: tuple[PositiveInt, ...] = Field(default=(8,), min_length=1)
    branches: NonNegativeInt = 0
    eta: PositiveFloat = 0.1
    limit: PositiveInt | None = None
    continues: bool = False


class Sampled(Fields):
    """What all recipes have that sample a task's problems.

    Attributes:
        verifiers: `NAME` or `NAME=WEIGHT`; `task` is the task's own reward.
        seed: of the sampling; another one makes other samples.
    """

    task: str
    verifiers: tuple[str, ...] = ("task",)
    sampling: SamplingFields = SamplingFields()
    guidance: GuidanceFields = GuidanceFields()
    server: ServerFields = ServerFields()
    seed: int = 0

    def judge(self) -> Judge:
        """To be used as an async context manager."""
        return Judge([Weighted.parse(one) for one in self.verifiers])


def loop_settings(
    recipe: Sampled, rollouts: RolloutFields, task: TaskRef, model: str, critic: TrainSettings, out: Path
) -> LoopSettings:
    """Rounds of rollouts and training, as the recipe describes them.

    Args:
        model: the name it is served under.
        critic: its `base` is a folder or a hub id.
        out: versions are `out/<name>/<version>`.
    """
    return LoopSettings(
        task=task,
        split=rollouts.split,
        model=model,
        samples=rollouts.samples,
        branches=rollouts.branches,
        sampling=recipe.sampling.of(task.task),
        eta=rollouts.eta,
        recipe=Versions(settings=critic, out=out, continues=rollouts.continues, eta=rollouts.eta),
        guidance=recipe.guidance.options(),
        limit=rollouts.limit,
        seed=recipe.seed,
        concurrency=recipe.server.concurrency,
    )


def with_base(critic: TrainSettings, root: str, name: str | None = None) -> TrainSettings:
    """The same, starting from `root` where the recipe means the served model; `name` is another name."""
    changes: dict[str, Any] = {"base": root} if critic.base == SERVED else {}
    return critic.model_copy(update=changes | ({"name": name} if name else {}))
