"""Tables of a recipe that several kinds share, and what they become."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from qsharp_core.wire.guidance import METHODS, MethodName, TailName
from trainer.evaluation.searches import search_named
from trainer.evaluation.settings import REFERENCE, Evaluation, every_setting
from trainer.loop.settings import CriticRecipe, LoopSettings
from trainer.rewards.verifiers import OWN, Judge, TaskRef, Weighted
from trainer.rollouts.parameters import SamplingParameters
from trainer.tasks.base import Task
from trainer.tasks.sources import task_of
from trainer.training.launcher import launcher_of
from trainer.training.settings import TrainingError, TrainSettings, kind_meant

SERVED = "served"
"""The value of `critic.base` that means the model that is served."""
ROWS = (REFERENCE, *METHODS)


class RecipeFields(BaseModel):
    """The fields of a recipe, or of a table in it; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SamplingFields(RecipeFields):
    """How the reference is sampled; the task decides what is None."""

    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    max_tokens: PositiveInt | None = None

    def of(self, task: Task) -> SamplingParameters:
        """The sampling of a task's problems."""
        return SamplingParameters(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_tokens=self.max_tokens or task.sampling.max_tokens,
            stop=task.sampling.stop,
        )


class GuidanceFields(RecipeFields):
    """Options of the requests' `guidance`; the server decides what is None."""

    candidates: PositiveInt | None = None
    min_prob: float | None = Field(default=None, ge=0, le=1)
    tail: TailName | None = None

    def options(self) -> tuple[tuple[str, Any], ...]:
        """The options that are set, by name."""
        return tuple(self.model_dump(exclude_none=True).items())


class ServerFields(RecipeFields):
    """The server that is sampled through: one that the recipe starts, or one that runs already.

    Attributes:
        url, admin_key: of a server that runs; it must have a rollout store, and see the recipe's folder at the same
            path.
        flags: of `qsharp serve`, for a server that the recipe starts.
        concurrency: requests at once.
        patience: seconds to wait until the server answers.
    """

    url: str | None = None
    admin_key: str | None = None
    flags: tuple[str, ...] = ()
    concurrency: PositiveInt = 32
    patience: PositiveFloat = 1800.0


MEASURED = dict.fromkeys(("etas", "methods", "searches", "kl_totals", "kl_tokens", "limit"), True)
"""The fields of a recipe's evaluation that may change from one run to the next."""


class EvaluationFields(RecipeFields):
    """What is measured, beside the reference: every method at every eta.

    Attributes:
        split: the split whose problems are measured.
        samples: completions of each problem under each setting.
        limit: only the first so many problems are measured; None is all of them.
        etas, methods: of the settings.
        kl_totals, kl_tokens: budgets of nats of the settings; None is without.
        searches: of the settings, as `best_of:n=8`; `none` is without.
        scored: whether the critic scores each completion, for best-of-k and weighted majorities.
    """

    split: str = "held_out"
    samples: PositiveInt = 4
    limit: PositiveInt | None = None
    etas: tuple[PositiveFloat, ...] = (0.1,)
    methods: tuple[MethodName, ...] = METHODS
    kl_totals: tuple[PositiveFloat | None, ...] = ()
    kl_tokens: tuple[PositiveFloat | None, ...] = ()
    searches: tuple[Annotated[str, AfterValidator(search_named)], ...] = ()
    scored: bool = True

    def of(self, recipe: "SampledFields", model: str, critic: str, task: Task) -> Evaluation:
        """The evaluation that a recipe asks for.

        Args:
            recipe: the recipe.
            model: the name that the server serves the reference under.
            critic: exact version of the critic that guides.
            task: whose problems are sampled.
        """
        return Evaluation(
            split=self.split,
            model=model,
            samples=self.samples,
            sampling=recipe.sampling.of(task),
            settings=every_setting(self.methods, self.etas, self.kl_totals, self.kl_tokens, self.searches),
            critic=critic,
            guidance=recipe.guidance.options(),
            scored=self.scored,
            limit=self.limit,
            seed=recipe.seed,
        )


class Published(RecipeFields):
    """Numbers of somebody else's experiment, to stand beside the measured ones.

    Attributes:
        source: where the numbers are from.
        eta: of the guided ones.
        results: numbers by name; `reference`, `cd` and `qsharp` stand in the rows of the table.
    """

    class Figure(RecipeFields):
        """An accuracy in percent, and a KL divergence in nats."""

        accuracy: float
        kl: float | None = None

    source: str
    eta: PositiveFloat = 0.1
    results: dict[str, Figure]

    def rows(self) -> dict[tuple[str, float | None], tuple[str, str]]:
        """Accuracy and KL as the table shows them, by method and eta."""
        return {
            (name, None if name == REFERENCE else self.eta): (
                f"{one.accuracy:g} %",
                "–" if one.kl is None else f"{one.kl:g}",
            )
            for name, one in self.results.items()
            if name in ROWS
        }

    def others(self) -> str:
        """What no row of the table shows, and the source, as people read it."""
        others = [
            f"{name.replace('_', ' ')} {one.accuracy:g} %" for name, one in self.results.items() if name not in ROWS
        ]
        return ", ".join([*others, self.source])


class RolloutFields(RecipeFields):
    """The rollouts that are learned from.

    Attributes:
        split: the split whose problems are sampled.
        samples: rollouts of each problem, by round; there are as many rounds as numbers.
        branches: further rollouts of each problem in the first round, which leave the others where the reference is
            unsure.
        eta: how strongly the roll-ins of later rounds are guided.
        limit: only the first so many problems are sampled; None is all of them.
        continues: whether later versions go on from the one before, instead of from `critic.base`.
    """

    split: str = "train"
    samples: tuple[PositiveInt, ...] = Field(default=(8,), min_length=1)
    branches: NonNegativeInt = 0
    eta: PositiveFloat = 0.1
    limit: PositiveInt | None = None
    continues: bool = False


def _launcher(text: str) -> str:
    try:
        launcher_of(text)
    except TrainingError as error:
        raise ValueError(str(error)) from error
    return text


class SampledFields(RecipeFields):
    """The fields of all recipes that sample a task's problems.

    Attributes:
        task: a name, or `module:object`; either this or `prompts`.
        prompts: a file of JSON lines, or the name of a data set.
        verifiers: `NAME`, `NAME=WEIGHT` or `module:function`; `task` is the task's own reward. A recipe may have
            `verifier` instead, with one of them.
        launcher: what starts the processes of a training, as `accelerate launch --num_processes 8`; None is a single
            process.
        seed: another seed makes other samples.
    """

    task: str | None = None
    prompts: str | None = None
    verifiers: tuple[str, ...] = (OWN,)
    sampling: SamplingFields = SamplingFields()
    guidance: GuidanceFields = GuidanceFields()
    server: ServerFields = ServerFields()
    launcher: Annotated[str, AfterValidator(_launcher)] | None = None
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _one_verifier(cls, fields: Any) -> Any:
        if not isinstance(fields, dict) or "verifier" not in fields:
            return fields
        if "verifiers" in fields:
            raise ValueError("name verifier or verifiers, not both")
        return {name: value for name, value in fields.items() if name != "verifier"} | {
            "verifiers": (fields["verifier"],)
        }

    @model_validator(mode="after")
    def _one_source(self) -> "SampledFields":
        if (self.task is None) == (self.prompts is None):
            raise ValueError("name either task or prompts")
        return self

    @property
    def source(self) -> str:
        """The task's name, or what the prompts are read from, for people."""
        return str(self.task or self.prompts)

    def problems(self) -> TaskRef:
        """The task whose problems are sampled.

        Raises:
            TaskError
        """
        return TaskRef(task_of(self.task, self.prompts), self.task)

    def judge(self) -> Judge:
        """The judge of completions, to be used as an async context manager."""
        return Judge([Weighted.parse(one) for one in self.verifiers])


def loop_settings(
    recipe: SampledFields, rollouts: RolloutFields, task: TaskRef, model: str, critic: TrainSettings, out: Path
) -> LoopSettings:
    """The loop of rollouts and training that a recipe describes.

    Args:
        recipe: how problems are sampled.
        rollouts: how many rollouts, in which rounds.
        task: whose problems are sampled.
        model: the name that the server serves the reference under.
        critic: how the critic is trained; its `base` is a folder or a hub id.
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
        recipe=CriticRecipe(
            settings=critic,
            out=out,
            continues=rollouts.continues,
            eta=rollouts.eta,
            launcher=launcher_of(recipe.launcher) if recipe.launcher else (),
        ),
        guidance=recipe.guidance.options(),
        limit=rollouts.limit,
        seed=recipe.seed,
        concurrency=recipe.server.concurrency,
    )


def with_kind(critic: Mapping[str, Any]) -> dict[str, Any]:
    """The table `critic` with base and kind filled in: a native critic of the served model, unless it says otherwise.

    Another base than the served model is one of a critic with a backbone of its own.
    """
    table = {"base": SERVED, **critic}
    if table["base"] == SERVED:
        table.setdefault("backbone", kind_meant(table))
    return table


def with_base(critic: TrainSettings, root: str, name: str | None = None) -> TrainSettings:
    """The settings with `base` filled in.

    Args:
        critic: settings whose `base` may mean the served model.
        root: folder or hub id of the served model.
        name: another name of the critic; None leaves it.
    """
    changes: dict[str, Any] = {"base": root} if critic.base == SERVED else {}
    return critic.model_copy(update=changes | ({"name": name} if name else {}))
